//! What a bus promises, on the embedded bus and on a real `nats-server`; then what only NATS does: another server, a
//! killed server, logins and TLS.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::cognitive_complexity,
    reason = "a failed expectation ends the test"
)]

#[path = "nats/behaviour.rs"]
mod behaviour;
#[path = "nats/cluster.rs"]
mod cluster;
#[path = "nats/declared.rs"]
mod declared;
#[path = "nats/gone.rs"]
mod gone;
#[path = "nats/large.rs"]
mod large;
#[path = "nats/later.rs"]
mod later;
#[path = "nats/logins.rs"]
mod logins;
#[path = "nats/lost.rs"]
mod lost;
#[path = "nats/managed.rs"]
mod managed;
#[path = "nats/many.rs"]
mod many;
#[path = "nats/server.rs"]
mod server;
#[path = "nats/several.rs"]
mod several;
#[path = "nats/storm.rs"]
mod storm;

use std::sync::Arc;
use std::time::Duration;

use behaviour::{Bus, events, next, publish, spec};
use duet_events::Event;
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
    ($($module:ident: $($name:ident),* $(,)?;)*) => {
        mod embedded {
            $($(#[tokio::test]
            async fn $name() {
                let dir = tempfile::TempDir::new().unwrap();
                let bus = crate::behaviour::Bus::Embedded(dir.path().to_owned());
                crate::$module::$name(&bus).await;
            })*)*
        }
        mod nats {
            $($(#[tokio::test]
            async fn $name() {
                let Some(server) = crate::Server::start("").await else { return };
                let bus = crate::behaviour::Bus::Nats(crate::options(&server));
                crate::$module::$name(&bus).await;
            })*)*
        }
    };
}

on_both!(
    behaviour:
    positions_count_from_one_and_survive_a_restart,
    the_same_source_and_id_is_stored_once_also_after_a_restart,
    the_deduplication_window_ends,
    a_new_subscription_starts_at_latest_unless_it_says_earliest,
    acknowledged_events_stay_handled_across_a_restart_and_others_come_back_unspent,
    competing_consumers_share_and_credit_bounds_each,
    what_a_leaving_consumer_had_goes_to_the_others_unspent,
    what_a_consumer_left_comes_before_what_is_newer,
    a_retry_spends_an_attempt_that_a_restart_remembers_and_a_release_does_not,
    a_retried_event_waits_while_others_pass,
    dead_letters_carry_the_reason_and_the_original_is_handled,
    a_removed_subscription_ends_its_consumers_and_starts_anew,
    bad_topic_names_are_invalid,
    any_printable_topic_name_is_a_topic_of_its_own,
    a_closed_bus_says_so,
    ;
    declared:
    a_declared_subscription_says_so_also_after_a_restart,
    a_topic_that_is_no_longer_declared_is_as_if_it_never_was,
    dead_letters_are_all_kept_also_where_a_subscriber_came_first,
    dead_letters_are_all_kept_also_where_their_topic_is_older,
    a_consumer_moves_nothing_and_leaves_other_topics_as_they_are,
    each_move_of_a_subscription_is_another_generation_also_after_a_restart,
    ;
);

/// What the embedded bus offers under the same trait is tested with it.
macro_rules! on_nats {
    ($module:ident: $($name:ident),* $(,)?) => {
        $(#[tokio::test]
        async fn $name() {
            let Some(server) = Server::start("").await else { return };
            $module::$name(&Bus::Nats(options(&server))).await;
        })*
    };
}

on_nats!(
    several:
    a_replay_that_another_control_plane_asks_for_misses_nothing,
    an_ordered_subscription_goes_on_at_once_with_the_next_consumer,
    a_subscription_rests_that_another_control_plane_pauses,
    consumers_of_another_control_plane_are_seen,
);

on_nats!(
    managed:
    a_key_keeps_its_order_through_retries_and_restarts,
    a_key_that_waits_leaves_room_for_others,
    events_of_a_source_keep_their_order,
    an_event_for_later_waits,
    any_number_of_events_for_later_holds_up_nobody,
    an_event_for_later_comes_once_to_those_who_are_there_then,
    an_event_for_later_outlasts_the_retention,
    an_expired_event_is_not_delivered,
    a_redriven_event_goes_to_its_subscription_only,
    a_dead_letter_that_has_expired_stays,
    a_subscription_goes_on_that_another_control_plane_resumes,
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
async fn another_client_reads_the_attributes_and_its_plain_messages_are_delivered() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    publish(&*bus, [1]).await;
    // Not by a subscription of the client: a publish may come before its server knows of it.
    let stream =
        async_nats::jetstream::new(client.clone()).get_stream("duet_orders").await.unwrap();
    let message = stream.get_raw_message(1).await.unwrap();
    assert_eq!(message.headers.get("ce-id").unwrap().as_str(), "1");
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

/// Values of a gauge, by subscription.
fn gauge(registry: &prometheus::Registry, name: &str) -> Vec<(String, f64)> {
    let families = registry.gather();
    let family = families.iter().filter(|family| family.name() == name);
    let of = |metric: &prometheus::proto::Metric| {
        let label = metric.get_label().iter().find(|label| label.name() == "subscription");
        (label.unwrap().value().to_owned(), metric.get_gauge().get_value())
    };
    family.flat_map(|family| family.get_metric().iter().map(of)).collect()
}

#[tokio::test]
async fn gauges_say_what_waits_and_go_with_the_subscription() {
    let Some(server) = Server::start("").await else { return };
    let registry = prometheus::Registry::new();
    let bus = NatsBus::open("default", options(&server), &registry).await.unwrap();
    bus.connected(Duration::from_secs(20)).await.unwrap();
    bus.ensure_subscription(spec("a/s")).await.unwrap();
    publish(&bus, 1..=3).await;
    behaviour::eventually("lag and age are told", async || {
        let lag = gauge(&registry, "duet_bus_subscription_lag_events");
        let age = gauge(&registry, "duet_bus_subscription_oldest_event_seconds");
        lag == [("a/s".to_owned(), 3.0)] && age.first().is_some_and(|(_, age)| *age > 0.0)
    })
    .await;
    bus.remove_subscription("a/s").await.unwrap();
    behaviour::eventually("they are gone", async || {
        gauge(&registry, "duet_bus_subscription_lag_events").is_empty()
    })
    .await;
}

#[tokio::test]
async fn an_event_that_the_server_does_not_take_is_refused_at_once_and_says_why() {
    let Some(server) = Server::start("max_payload: 65536").await else { return };
    let bus = connect(options(&server)).await;
    let large = Event::new("1", "/test", "t").unwrap().with_data("x".repeat(70_000));
    let error = bus.publish("orders", vec![large]).await.unwrap_err();
    assert_eq!(error.kind, PublishErrorKind::Invalid);
    assert!(error.message.contains("max_payload") && error.message.contains("65536"), "{error}");
    publish(&*bus, [2]).await;
}

#[tokio::test]
async fn nothing_is_left_of_a_subscription_that_was_idle_for_too_long() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    publish(&*bus, [1]).await;
    let kept = spec("a/kept");
    bus.ensure_subscription(kept).await.unwrap();
    let idle_expiry = Some(Duration::from_secs(1));
    let reader = duet_events::bus::SubscriptionSpec { idle_expiry, ..spec("a/reader") };
    let mut consumer = bus.consume(reader).await.unwrap();
    let delivery = next(&mut consumer).await;
    consumer.settler().settle(delivery.id, Settle::Retry { delay: Duration::ZERO });
    assert_eq!(next(&mut consumer).await.attempt, 2);
    let js = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let state = js.get_key_value("duet-state").await.unwrap();
    let keys = async || {
        use futures::TryStreamExt as _;
        let mut keys: Vec<String> = state.keys().await.unwrap().try_collect().await.unwrap();
        keys.sort();
        keys
    };
    assert_eq!(keys().await, ["a.a_2Freader.1", "s.a_2Fkept", "s.a_2Freader"]);
    drop(consumer);
    behaviour::eventually("its record is gone", async || keys().await == ["s.a_2Fkept"]).await;
}

#[tokio::test]
async fn a_subscription_that_becomes_ordered_keeps_its_place() {
    let Some(server) = Server::start("").await else { return };
    let bus = connect(options(&server)).await;
    let mut consumer = bus.consume(spec("a/s")).await.unwrap();
    publish(&*bus, 1..=3).await;
    let first = next(&mut consumer).await;
    consumer.settler().settle(first.id, Settle::Ack);
    behaviour::eventually("it is handled", async || bus.subscriptions().await.unwrap()[0].lag == 2)
        .await;
    let ordered = duet_events::bus::SubscriptionSpec { ordered: true, ..spec("a/s") };
    bus.ensure_subscription(ordered.clone()).await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(20), async {
        while let Some(Ok(_)) = consumer.next().await {}
    });
    assert!(end.await.is_ok(), "those who consume by the old settings come again");
    let mut consumer = bus.consume(ordered).await.unwrap();
    let keyless = next(&mut consumer).await;
    assert_eq!((keyless.event.id(), keyless.attempt), ("2", 1));
    let client = async_nats::connect(server.url()).await.unwrap();
    let stream = async_nats::jetstream::new(client).get_stream("duet_orders").await.unwrap();
    let info = stream.consumer_info("a_2Fs").await.unwrap();
    assert_eq!(info.config.max_ack_pending, 2000);
}
