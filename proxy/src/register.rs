//! Tells the control plane that this replica is here, for as long as it is.
//!
//! The registration is renewed on an open stream at a third of its lease; closing the stream in order (drain)
//! removes it at once.

use std::time::Duration;

use duet_api::proto::workloads_client::WorkloadsClient;
use duet_api::proto::{RegisterRequest, RegisterResponse, Registration};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::identity::{SvidWatch, uplink};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Where the control plane gives none.
const DEFAULT_LEASE: Duration = Duration::from_secs(15);

/// Bound on taking the registration back.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Keeps the registration until told to stop, and then takes it back. `ready` is whether the application takes traffic.
pub async fn run(
    registration: Registration,
    channel: Channel,
    mut svid: SvidWatch,
    mut ready: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    let work = async {
        // Fails only when the identity task has ended, at shutdown.
        svid.wait_for(Option::is_some).await.map(|_first| ()).ok();
        let mut backoff = FIRST_BACKOFF;
        loop {
            let held = hold(&registration, channel.clone(), &mut ready, (&mut backoff, &stop));
            match held.await {
                Ok(()) if stop.is_cancelled() => return,
                Ok(()) => tracing::info!("the control plane closed the registration"),
                Err(status) => {
                    let reason = uplink::message(&status);
                    tracing::warn!(reason, code = %status.code(), "not registered");
                }
            }
            tokio::time::sleep(backoff.mul_f64(0.5 + rand::random::<f64>())).await;
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    };
    let given_up = async {
        stop.cancelled().await;
        tokio::time::sleep(LEAVE_TIMEOUT).await;
    };
    tokio::select! {
        () = work => {}
        () = given_up => {}
    }
}

async fn hold(
    registration: &Registration,
    channel: Channel,
    ready: &mut watch::Receiver<bool>,
    (backoff, stop): (&mut Duration, &CancellationToken),
) -> Result<(), tonic::Status> {
    let (requests, outgoing) = mpsc::channel(4);
    let now = |ready: bool| RegisterRequest {
        registration: Some(Registration { ready, ..registration.clone() }),
    };
    let gone = |_closed| tonic::Status::unavailable("the stream ended");
    let first = now(*ready.borrow_and_update());
    requests.send(first).await.map_err(gone)?;
    let mut client = WorkloadsClient::new(channel);
    let call = client.register(ReceiverStream::new(outgoing));
    let mut answers = tokio::time::timeout(CONNECT_TIMEOUT, call)
        .await
        .map_err(|_elapsed| tonic::Status::deadline_exceeded("no answer"))??
        .into_inner();
    let mut lease = next(&mut answers).await?.map_or(DEFAULT_LEASE, |answer| length(&answer));
    *backoff = FIRST_BACKOFF;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            answer = next(&mut answers) => match answer? {
                Some(answer) => lease = length(&answer),
                None => return Ok(()),
            },
            changed = ready.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let request = now(*ready.borrow_and_update());
                requests.send(request).await.map_err(gone)?;
            }
            () = tokio::time::sleep(lease / 3) => {
                requests.send(RegisterRequest { registration: None }).await.map_err(gone)?;
            }
        }
    }
    // The stream's orderly end takes the registration back at once; a broken one would wait for its lease.
    drop(requests);
    while next(&mut answers).await?.is_some() {}
    Ok(())
}

async fn next(
    answers: &mut Streaming<RegisterResponse>,
) -> Result<Option<RegisterResponse>, tonic::Status> {
    answers.message().await
}

fn length(answer: &RegisterResponse) -> Duration {
    let lease = answer.lease.and_then(|lease| Duration::try_from(lease).ok());
    lease.unwrap_or(DEFAULT_LEASE).max(Duration::from_millis(100))
}
