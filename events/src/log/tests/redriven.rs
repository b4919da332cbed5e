//! Dead letters that were moved back, and the deduplication window.

use super::*;

/// The window of a topic that nobody declares, in milliseconds.
const WINDOW: u64 = 300_000;

/// A topic whose event 1 was published at 0, given up, and moved back at `at_ms`; read again by a new process.
fn redriven_at(dir: &TempDir, at_ms: u64) -> Engine {
    let mut before = engine(dir);
    before.append("t", prepared([1], 0), 0).unwrap();
    before.commit().unwrap();
    consume_all(&mut before, &Settle::DeadLetter { reason: "no".to_owned(), status: 0 });
    assert_eq!(before.redrive("t.dead-letter", vec![1], at_ms).unwrap(), 1);
    before.commit().unwrap();
    drop(before);
    engine(dir)
}

#[test]
fn what_is_moved_back_to_one_subscription_keeps_no_event_from_the_others_also_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let mut engine = redriven_at(&dir, WINDOW + 10);
    let published = engine.append("t", prepared([1], WINDOW + 20), WINDOW + 20).unwrap();
    assert_eq!((published[0].position, published[0].duplicate), (3, false));
}

#[test]
fn the_event_itself_stays_known_for_its_window() {
    let dir = TempDir::new().unwrap();
    let mut engine = redriven_at(&dir, 10);
    let published = engine.append("t", prepared([1], 20), 20).unwrap();
    assert_eq!((published[0].position, published[0].duplicate), (1, true));
}
