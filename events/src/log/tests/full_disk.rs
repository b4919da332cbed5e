//! What the log does where the disk has no room.

use super::*;

#[tokio::test]
async fn a_full_disk_is_said_and_the_log_goes_on_when_there_is_room() {
    let dir = TempDir::new().unwrap();
    let controls = Arc::new(Controls::default());
    let log = open_on(&dir, Arc::clone(&controls)).await;
    log.append("t", entries([1])).await.unwrap();
    controls.full.store(true, Ordering::Relaxed);
    assert_eq!(log.append("t", entries([2])).await, Err(LogError::DiskFull));
    assert_eq!(log.append("t", entries([3])).await, Err(LogError::DiskFull));
    controls.full.store(false, Ordering::Relaxed);
    let recovered = async {
        while log.append("t", entries([4])).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), recovered).await.unwrap();
    let last = log.append("t", entries([5])).await.unwrap()[0].position;
    let all = positions(&log, usize::try_from(last).unwrap()).await;
    assert_eq!(all, (1..=last).collect());
    log.close().await;
}

#[tokio::test]
async fn a_nearly_full_disk_refuses_events_and_goes_on_delivering() {
    let dir = TempDir::new().unwrap();
    let controls = Arc::new(Controls::default());
    let log = open_on(&dir, Arc::clone(&controls)).await;
    log.append("t", entries(1..=2)).await.unwrap();
    let mut consumer = log.consume(spec(Start::Earliest)).await.unwrap();
    controls.low.store(true, Ordering::Relaxed);
    let refused = async {
        while log.append("t", entries([3])).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), refused).await.unwrap();
    for position in 1..=2 {
        let delivery = consumer.deliveries.recv().await.unwrap();
        assert_eq!(delivery.position, position);
        consumer.backend.settle(delivery.id, Settle::Ack);
    }
    let settled = async {
        while log.backlog("a/s").await.unwrap().events > 1 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), settled).await.unwrap();
    controls.low.store(false, Ordering::Relaxed);
    let recovered = async {
        while log.append("t", entries([4])).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), recovered).await.unwrap();
    // The same consumer all along.
    let position = consumer.deliveries.recv().await.unwrap().position;
    assert!(position >= 3, "{position}");
}

/// Waits until a question to the engine has the answer.
async fn until(log: &Log, mut is_so: impl FnMut(&mut Engine) -> bool + Copy + Send + 'static) {
    let waits = async {
        while !log.run(move |engine, _now| Ok(is_so(engine))).await.unwrap() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), waits).await.unwrap();
}

/// What is delayed is due.
fn hurry(engine: &mut Engine) {
    engine.subscriptions.get_mut("a/s").unwrap().progress.wake(u64::MAX);
    engine.touch("a/s");
}

#[tokio::test]
async fn a_dead_letter_that_has_no_room_is_delivered_again_and_holds_up_nothing() {
    let dir = TempDir::new().unwrap();
    let controls = Arc::new(Controls::default());
    let log = open_on(&dir, Arc::clone(&controls)).await;
    log.append("t", entries(1..=2)).await.unwrap();
    let mut consumer = log.consume(spec(Start::Earliest)).await.unwrap();
    let first = consumer.deliveries.recv().await.unwrap();
    let second = consumer.deliveries.recv().await.unwrap();
    controls.low.store(true, Ordering::Relaxed);
    let refused = async {
        while log.append("t", entries([3])).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), refused).await.unwrap();
    let dead = || Settle::DeadLetter { reason: "no".to_owned(), status: 0 };
    consumer.backend.settle(first.id, dead());
    consumer.backend.settle(second.id, Settle::Ack);
    until(&log, |engine| {
        let subscription = &engine.subscriptions["a/s"];
        !subscription.progress.is_open(2, None) && subscription.progress.waits(1)
    })
    .await;
    let (waits_ms, letters) = log
        .run(|engine, now_ms| {
            let due_ms = engine.subscriptions["a/s"].progress.next_wake().unwrap();
            let letters = engine.topics.get("t.dead-letter").map_or(0, |topic| topic.events());
            Ok((due_ms.saturating_sub(now_ms), letters))
        })
        .await
        .unwrap();
    assert!((5_000..=10_000).contains(&waits_ms), "{waits_ms}");
    assert_eq!(letters, 0);
    // As soon as there is room, and without waiting for ten seconds here.
    controls.low.store(false, Ordering::Relaxed);
    log.run(|engine, _now| {
        hurry(engine);
        Ok(())
    })
    .await
    .unwrap();
    let stored = async {
        loop {
            let again = consumer.deliveries.recv().await.unwrap();
            if again.position == 1 {
                assert_eq!(again.attempt, 1, "unspent");
                consumer.backend.settle(again.id, dead());
            }
            // The disk is looked at once a second.
            let letters = log
                .run(|engine, _now| {
                    hurry(engine);
                    Ok(engine.topics.get("t.dead-letter").map_or(0, |topic| topic.events()))
                })
                .await;
            if letters.unwrap() == 1 {
                return;
            }
        }
    };
    timeout(Duration::from_secs(20), stored).await.unwrap();
}
