//! The task that keeps the stream open and applies what it brings.

use std::sync::Arc;
use std::time::Duration;

use duet_api::proto::discovery_client::DiscoveryClient;
use duet_api::proto::watch_request::Kind as Ask;
use duet_api::proto::watch_response::Kind as Answer;
use duet_api::proto::{Ack, Reject, Subscribe, Unsubscribe, WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;

use super::state::{View, apply};
use super::{Inputs, SWEEP_INTERVAL};
use crate::identity::SvidWatch;

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Requests to the control plane. Unbounded, since each is one of: a wish (bounded by the destinations), or an
/// answer to an update (bounded by what the control plane sends).
type Asks = mpsc::UnboundedSender<WatchRequest>;

/// Keeps the stream open until told to stop. Waits for the first certificate.
pub async fn run<T: Send + Sync + 'static>(
    mut inputs: Inputs<T>,
    channel: Channel,
    mut svid: SvidWatch,
    stop: CancellationToken,
) {
    let work = async {
        // Fails only when the identity task has ended, at shutdown.
        svid.wait_for(Option::is_some).await.map(|_first| ()).ok();
        let mut backoff = FIRST_BACKOFF;
        loop {
            match open(&inputs, channel.clone()).await {
                Ok((asks, answers)) => {
                    inputs.metrics.connected.set(1);
                    let end = follow(&mut inputs, &asks, answers, &mut backoff).await;
                    inputs.metrics.connected.set(0);
                    tracing::warn!(
                        reason = end,
                        "the control plane's stream ended; going on with what is known"
                    );
                }
                Err(status) => {
                    let reason = crate::identity::uplink::message(&status);
                    tracing::warn!(reason, code = %status.code(), "no stream from the control plane");
                }
            }
            tokio::time::sleep(backoff.mul_f64(0.5 + rand::random::<f64>())).await;
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    };
    tokio::select! {
        () = work => {}
        () = stop.cancelled() => {}
    }
}

async fn open<T>(
    inputs: &Inputs<T>,
    channel: Channel,
) -> Result<(Asks, Streaming<WatchResponse>), tonic::Status> {
    let (asks, outgoing) = mpsc::unbounded_channel();
    send(&asks, Ask::Node(inputs.node.clone()));
    for authority in inputs.entries.lock().keys() {
        send(&asks, Ask::Subscribe(Subscribe { authority: authority.to_string() }));
    }
    let mut client = DiscoveryClient::new(channel);
    let call = client.watch(UnboundedReceiverStream::new(outgoing));
    let response = tokio::time::timeout(CONNECT_TIMEOUT, call)
        .await
        .map_err(|_elapsed| tonic::Status::deadline_exceeded("no answer"))??;
    Ok((asks, response.into_inner()))
}

fn send(asks: &Asks, kind: Ask) {
    // Fails only when the stream has ended, which the reading side notices.
    asks.send(WatchRequest { kind: Some(kind) }).ok();
}

/// The stream is open before the control plane has looked at who asks: only an answer says that it was let in, and sets
/// `backoff` back.
async fn follow<T>(
    inputs: &mut Inputs<T>,
    asks: &Asks,
    mut answers: Streaming<WatchResponse>,
    backoff: &mut Duration,
) -> String {
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            wish = inputs.wishes.recv() => match wish {
                Some(authority) => {
                    inputs.metrics.destinations.set(count(inputs.entries.lock().len()));
                    send(asks, Ask::Subscribe(Subscribe { authority: authority.to_string() }));
                }
                None => return "shutting down".to_owned(),
            },
            answer = answers.message() => match answer {
                Ok(Some(answer)) => {
                    *backoff = FIRST_BACKOFF;
                    handle(inputs, asks, answer);
                }
                Ok(None) => return "closed by the control plane".to_owned(),
                Err(status) => return crate::identity::uplink::message(&status),
            },
            _ = sweep.tick() => unsubscribe_unused(inputs, asks),
        }
    }
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn unsubscribe_unused<T>(inputs: &Inputs<T>, asks: &Asks) {
    let mut entries = inputs.entries.lock();
    entries.retain(|authority, entry| {
        let used = entry.receiver_count() > 0;
        if !used {
            send(asks, Ask::Unsubscribe(Unsubscribe { authority: authority.to_string() }));
        }
        used
    });
    inputs.metrics.destinations.set(count(entries.len()));
}

fn handle<T>(inputs: &Inputs<T>, asks: &Asks, answer: WatchResponse) {
    let (authority, version, outcome) = match answer.kind {
        Some(Answer::Workload(workload)) => {
            let version = workload.version;
            inputs.workload.send_replace(Some(Arc::new(workload)));
            (String::new(), version, Ok(()))
        }
        Some(Answer::Destination(update)) => {
            let entries = inputs.entries.lock();
            // Unsubscribed from while the update was on its way.
            let Some(entry) = entries.get(update.authority.as_str()) else {
                return;
            };
            let view = apply(&entry.borrow(), &update, inputs.compile);
            let outcome = view.map(|view: View<T>| {
                entry.send_replace(view);
            });
            (update.authority, update.version, outcome)
        }
        None => return,
    };
    match outcome {
        Ok(()) => {
            inputs.metrics.updates.with_label_values(&["applied"]).inc();
            send(asks, Ask::Ack(Ack { authority, version }));
        }
        Err(reason) => {
            inputs.metrics.updates.with_label_values(&["rejected"]).inc();
            tracing::warn!(authority, version, reason, "update rejected; the last good one stays");
            send(asks, Ask::Reject(Reject { authority, version, reason }));
        }
    }
}
