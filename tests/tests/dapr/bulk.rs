//! Several events in one call, by the Python SDK.

use super::*;

#[tokio::test]
async fn a_grpc_application_takes_several_events_in_one_call() {
    several_events_in_one_call("dapr_bulk_app.py").await;
}

#[tokio::test]
async fn a_grpc_application_takes_several_events_by_the_older_name_of_the_call() {
    several_events_in_one_call("dapr_bulk_alpha_app.py").await;
}

async fn several_events_in_one_call(program: &str) {
    let Some(python) = python() else { return };
    let control_plane = ControlPlane::start(&[("services.yaml", SERVICES)]).await;
    let port = free_port();
    let options = Options::service("callback", port).protocol("grpc");
    let callback = Sidecar::start(&control_plane, options).await;
    let folder = control_plane.folder.path();
    let script = Script::start(&python, folder, program, callback.ports, port);
    callback.wait_ready().await;
    subscribed(&callback, &["orders", "orders.dead"]).await;
    every_verdict_is_kept(&script, &callback).await;
    for number in 0..20 {
        publish(&callback, &number.to_string()).await;
    }
    eventually("twenty more in fewer calls", SOON, || async {
        let arrived = |number: i32| !script.events("orders", &number.to_string()).is_empty();
        (0..20).all(arrived).then_some(())
    })
    .await;
    let notes = script.notes();
    let largest = notes.iter().filter_map(|note| note["entries"].as_u64()).max();
    assert!(largest > Some(1), "{notes:#?}");
}

#[tokio::test]
async fn an_application_without_a_handler_for_several_events_gets_one_by_one() {
    let Some(python) = python() else { return };
    let bulk = "\
apiVersion: duet.dev/v1alpha1
kind: Subscription
metadata: {name: many}
spec:
  topic: orders
  subscriber: {service: callback, path: /}
  deadLetterTopic: orders.dead
  bulk: {max: 10, wait: 100ms}
  delivery: {ackTimeout: 1s}
";
    let resources = [("services.yaml", SERVICES), ("bulk.yaml", bulk)];
    let control_plane = ControlPlane::start(&resources).await;
    let port = free_port();
    let options = Options::service("callback", port).protocol("grpc");
    let callback = Sidecar::start(&control_plane, options).await;
    let folder = control_plane.folder.path();
    let script = Script::start(&python, folder, "dapr_single_app.py", callback.ports, port);
    callback.wait_ready().await;
    subscribed(&callback, &["orders"]).await;
    publish(&callback, "first").await;
    publish(&callback, "last").await;
    eventually("both events", SOON, || async {
        let all = ["first", "last"].iter().all(|text| !script.events("orders", text).is_empty());
        all.then_some(())
    })
    .await;
    // Together they take twice the time that one may take.
    let slow: Vec<_> = (0..5).map(|number| format!("slow {number}")).collect();
    for text in &slow {
        publish(&callback, text).await;
    }
    let acks = [("outcome", "ack")];
    eventually("all are handled", SOON, || async {
        let name = "duet_event_deliveries_total";
        (duet_tests::metrics::sum(callback.ports.metrics, name, &acks).await >= 7.0).then_some(())
    })
    .await;
    for text in &slow {
        assert_eq!(script.events("orders", text).len(), 1, "{text}");
    }
}
