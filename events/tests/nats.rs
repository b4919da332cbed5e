//! What a bus promises, on the embedded bus and on a real `nats-server`; then what only NATS does: another server, a
//! killed server, logins and TLS.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a failed expectation ends the test"
)]

#[path = "nats/behaviour.rs"]
mod behaviour;
#[path = "nats/server.rs"]
mod server;

use std::sync::Arc;
use std::time::Duration;

use behaviour::{Bus, events, next, publish, spec};
use duet_events::bus::{EventBus as _, ManagedBus as _, PublishErrorKind, Settle, Start};
use duet_events::nats::{NatsBus, NatsLogin, NatsOptions};
use server::Server;

fn options(server: &Server) -> NatsOptions {
    NatsOptions {
        servers: vec![server.url()],
        replicas: 1,
        stream_prefix: "duet".to_owned(),
        login: NatsLogin::None,
        tls: None,
    }
}

async fn connect(options: NatsOptions) -> Arc<NatsBus> {
    let registry = prometheus::Registry::new();
    let bus = NatsBus::open("default", options, &registry).await.unwrap();
    bus.connected(Duration::from_secs(20)).await.unwrap();
    Arc::new(bus)
}

/// Each behaviour is one test a bus.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod embedded {
            $(#[tokio::test]
            async fn $name() {
                let dir = tempfile::TempDir::new().unwrap();
                let bus = crate::behaviour::Bus::Embedded(dir.path().to_owned());
                crate::behaviour::$name(&bus).await;
            })*
        }
        mod nats {
            $(#[tokio::test]
            async fn $name() {
                let Some(server) = crate::Server::start("").await else { return };
                let bus = crate::behaviour::Bus::Nats(crate::options(&server));
                crate::behaviour::$name(&bus).await;
            })*
        }
    };
}

on_both!(
    positions_count_from_one_and_survive_a_restart,
    the_same_source_and_id_is_stored_once_also_after_a_restart,
    the_deduplication_window_ends,
    a_new_subscription_starts_at_latest_unless_it_says_earliest,
    acknowledged_events_stay_handled_across_a_restart_and_others_come_back_unspent,
    competing_consumers_share_and_credit_bounds_each,
    what_a_leaving_consumer_had_goes_to_the_others_unspent,
    a_retry_spends_an_attempt_that_a_restart_remembers_and_a_release_does_not,
    a_retried_event_waits_while_others_pass,
    dead_letters_carry_the_reason_and_the_original_is_handled,
    a_removed_subscription_ends_its_consumers_and_starts_anew,
    bad_topic_names_are_invalid,
    any_printable_topic_name_is_a_topic_of_its_own,
    a_closed_bus_says_so,
);

/// What the embedded bus offers under the same trait is tested with it.
macro_rules! on_nats {
    ($($name:ident),* $(,)?) => {
        $(#[tokio::test]
        async fn $name() {
            let Some(server) = Server::start("").await else { return };
            behaviour::$name(&Bus::Nats(options(&server))).await;
        })*
    };
}

on_nats!(
    a_key_keeps_its_order_through_retries_and_restarts,
    an_event_for_later_waits,
    an_expired_event_is_not_delivered,
    a_redriven_event_goes_to_its_subscription_only,
    a_moved_subscription_sees_everything_again,
    a_paused_subscription_rests_also_after_a_restart,
    topics_and_subscriptions_are_told,
    removed_events_are_gone,
);

#[tokio::test]
async fn events_survive_a_killed_server_and_publishes_fail_fast_meanwhile() {
    let Some(mut server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    publish(&*bus, 1..=3).await;
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, Settle::Ack);
    let second = next(&mut consumer).await;
    server.kill();
    behaviour::eventually("the connection is seen to be gone", async || {
        let error = bus.publish("orders", events([9])).await;
        error.is_err_and(|error| error.kind == PublishErrorKind::Unavailable)
    })
    .await;
    let before = std::time::Instant::now();
    let error = bus.publish("orders", events([9])).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Unavailable);
    assert!(before.elapsed() < Duration::from_secs(1), "fails at once");
    server.restart().await;
    bus.connected(Duration::from_secs(20)).await.ok();
    behaviour::eventually("publishing works again", async || {
        bus.publish("orders", events([4])).await.is_ok()
    })
    .await;
    consumer.settler().settle(second.id, Settle::Ack);
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt, 1, "nobody's fault");
        consumer.settler().settle(delivery.id, Settle::Ack);
        // An event of which the killed server had not yet heard may come again.
        if ["3", "4"].contains(&delivery.event.id()) {
            seen.push(delivery.event.id().to_owned());
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen, ["3", "4"]);
}

#[tokio::test]
async fn a_wrong_login_is_away_and_the_right_one_works() {
    let Some(server) = Server::start("authorization { token: sesame }").await else { return };
    let registry = prometheus::Registry::new();
    let bus = NatsBus::open("default", options(&server), &registry).await.unwrap();
    assert!(bus.connected(Duration::from_secs(1)).await.is_err());
    let error = bus.publish("orders", events([1])).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Unavailable);
    let login = NatsLogin::Token("sesame".to_owned());
    let bus = connect(NatsOptions { login, ..options(&server) }).await;
    assert_eq!(publish(&*bus, [1]).await[0].position, 1);
}

#[tokio::test]
async fn another_client_reads_the_attributes_and_its_plain_messages_are_delivered() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    let mut inbox = client.subscribe("duet.>").await.unwrap();
    client.flush().await.unwrap();
    publish(&*bus, [1]).await;
    use futures::StreamExt as _;
    let message = inbox.next().await.unwrap();
    assert_eq!(message.headers.unwrap().get("ce-id").unwrap().as_str(), "1");
    client.publish("duet.orders", "plain".into()).await.unwrap();
    let mut broken = async_nats::HeaderMap::new();
    broken.insert("ce-id", "x");
    client.publish_with_headers("duet.orders", broken, "bad".into()).await.unwrap();
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    assert_eq!(next(&mut consumer).await.event.id(), "1");
    let plain = next(&mut consumer).await.event;
    assert_eq!(plain.data().unwrap().as_ref(), b"plain");
    let mut letters = bus
        .consume(duet_events::bus::SubscriptionSpec {
            topic: "orders.dead-letter".to_owned(),
            dead_letter_topic: "worse".to_owned(),
            start: Start::Earliest,
            ..spec("a/dead")
        })
        .await
        .unwrap();
    let letter = next(&mut letters).await.event;
    assert_eq!(letter.data().unwrap().as_ref(), b"bad");
    assert!(letter.attribute("deadletterreason").unwrap().contains("not a valid event"));
}
