//! `duet.v1.Identity`: who proves who it is gets a certificate that says so. Proof is a join token at first contact, and the
//! certificate of the connection at renewal. An identity that was revoked gets none by
//! either. Imports [`crate::ca`], [`crate::token`], [`crate::revoked`] and [`crate::listen`].

use std::path::PathBuf;
use std::sync::Arc;

use duet_api::proto;
use duet_api::proto::identity_server::Identity;
use duet_api::spiffe::SpiffeId;
use tonic::{Code, Request, Response, Status};

use crate::ca::Ca;
use crate::listen::Peer;
use crate::revoked;
use crate::telemetry::Metrics;
use crate::token::{self, TokenRefusal};

const SERVICE: &str = "identity";
/// A token has about 500 bytes.
const MAX_TOKEN_BYTES: usize = 8 << 10;

/// The service.
#[derive(Debug)]
pub struct IdentityService {
    /// Signs.
    pub ca: Arc<Ca>,
    /// The state folder, where tokens are recorded.
    pub state: PathBuf,
    /// Counts what was signed and refused.
    pub metrics: Metrics,
}

/// A refusal, with a short word for metrics.
struct Refusal {
    reason: &'static str,
    status: Status,
}

impl Refusal {
    fn new(reason: &'static str, code: Code, text: impl Into<String>) -> Self {
        Self { reason, status: Status::new(code, text) }
    }
}

impl From<TokenRefusal> for Refusal {
    fn from(refusal: TokenRefusal) -> Self {
        let code = match &refusal {
            TokenRefusal::Store(error) => {
                tracing::error!(%error, "the records of join tokens cannot be used");
                Code::Unavailable
            }
            TokenRefusal::Revoked | TokenRefusal::Used => Code::PermissionDenied,
            TokenRefusal::Invalid(_) | TokenRefusal::Expired => Code::Unauthenticated,
        };
        Self::new(refusal.reason(), code, refusal.to_string())
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn certify(
        &self,
        request: Request<proto::CertifyRequest>,
    ) -> Result<Response<proto::CertifyResponse>, Status> {
        let peer = Peer::of(&request).cloned();
        let address = peer.as_ref().map(|peer| peer.address.to_string()).unwrap_or_default();
        let id = peer.and_then(|peer| peer.id);
        let (ca, state) = (Arc::clone(&self.ca), self.state.clone());
        let request = request.into_inner();
        let method = if request.token.is_empty() { "renewal" } else { "token" };
        // Signing and the record of a used token take milliseconds: not on the threads that serve streams.
        let outcome = tokio::task::spawn_blocking(move || certify(&ca, &state, &request, id)).await;
        let outcome = outcome.unwrap_or_else(|error| {
            Err(Refusal::new("internal", Code::Internal, format!("signing failed: {error}")))
        });
        match outcome {
            Ok(response) => {
                self.metrics.certificates.with_label_values(&[method]).inc();
                tracing::info!(
                    peer = address,
                    id = response.spiffe_id,
                    method,
                    "certificate signed"
                );
                Ok(Response::new(response))
            }
            Err(Refusal { reason, status }) => {
                self.metrics.refused.with_label_values(&[SERVICE, reason]).inc();
                tracing::warn!(peer = address, method, "certificate refused: {}", status.message());
                Err(status)
            }
        }
    }
}

fn certify(
    ca: &Ca,
    state: &std::path::Path,
    request: &proto::CertifyRequest,
    peer: Option<SpiffeId>,
) -> Result<proto::CertifyResponse, Refusal> {
    let (id, claims) = if request.token.is_empty() {
        let text = "a certificate needs a join token, or the certificate that is to be renewed";
        let peer = peer.ok_or_else(|| Refusal::new("anonymous", Code::Unauthenticated, text))?;
        (peer, None)
    } else if request.token.len() > MAX_TOKEN_BYTES {
        let text = "the join token is too long to be one";
        return Err(Refusal::new("token_invalid", Code::Unauthenticated, text));
    } else {
        let claims = token::verify(state, ca, &request.token)?;
        (claims.sub.clone(), Some(claims))
    };
    if id.is_control_plane() {
        let text = "the control plane's own identity is not given away";
        return Err(Refusal::new("control_plane", Code::PermissionDenied, text));
    }
    let identity = revoked::Identity::from(&id);
    match identity.is_revoked(state) {
        Ok(false) => {}
        Ok(true) => {
            let text = format!("{identity} was revoked; `duet token restore` takes that back");
            return Err(Refusal::new("revoked", Code::PermissionDenied, text));
        }
        Err(error) => {
            tracing::error!(%error, "the revoked identities cannot be read");
            let text = "the control plane cannot look up whether the identity was revoked";
            return Err(Refusal::new("internal", Code::Unavailable, text));
        }
    }
    let svid = ca
        .sign_request(&request.csr, &id)
        .map_err(|error| Refusal::new("csr", Code::InvalidArgument, error.to_string()))?;
    // Last, so that a bad request does not cost the token; and before the answer, so that a crash cannot give two.
    if let Some(claims) = claims {
        token::spend(state, &claims)?;
    }
    Ok(proto::CertifyResponse {
        chain: vec![svid.certificate.to_vec()],
        trust_bundle: vec![ca.certificate().to_vec()],
        spiffe_id: id.to_string(),
        lifetime: prost_types::Duration::try_from(svid.lifetime).ok(),
    })
}
