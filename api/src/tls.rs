//! TLS 1.3 configurations that verify SPIFFE identities, for every connection between parts of the mesh.
//!
//! The names in certificates are SPIFFE URIs, not DNS names, so the verifiers here check the chain against the
//! trust bundle with webpki (through rustls) and then the URI SAN. No host name is ever verified.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::spiffe::{SpiffeError, SpiffeId};

/// What a process needs to take part in the mesh's mTLS.
#[derive(Debug)]
pub struct TlsMaterial {
    /// SVID and intermediates, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Private key of the leaf, PKCS#8 or SEC1.
    pub key: PrivateKeyDer<'static>,
    /// Trust bundle: root certificates.
    pub roots: Vec<CertificateDer<'static>>,
    /// The identity in the leaf.
    pub id: SpiffeId,
}

/// Whom to accept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Exactly this identity.
    Exactly(SpiffeId),
    /// Any workload of the trust domain.
    TrustDomain(String),
}

/// Why a certificate does not name a workload.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not an X.509 certificate.
    #[error("not an X.509 certificate")]
    Parse,
    /// An SVID has exactly one URI SAN (X.509-SVID section 2).
    #[error("the certificate has {0} URI names instead of one")]
    UriCount(usize),
    /// The URI is not a SPIFFE id of our form.
    #[error(transparent)]
    Spiffe(#[from] SpiffeError),
    /// It is somebody else's.
    #[error("the peer is {actual}, expected {expected}")]
    Mismatch {
        /// Whom the certificate names.
        actual: SpiffeId,
        /// Who was wanted.
        expected: String,
    },
    /// First contact: the presented CA is not the one that the join token names.
    #[error("the server's CA is not the one named by the join token")]
    CaHash,
}

/// The identity that a certificate names.
///
/// # Errors
/// When it is not a certificate with exactly one URI SAN that is a SPIFFE id.
pub fn spiffe_id(certificate: &CertificateDer<'_>) -> Result<SpiffeId, IdentityError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|_err| IdentityError::Parse)?;
    let names = parsed.subject_alternative_name().map_err(|_err| IdentityError::Parse)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris.as_slice() {
        [uri] => Ok(uri.parse()?),
        uris => Err(IdentityError::UriCount(uris.len())),
    }
}

impl Peer {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), IdentityError> {
        let actual = spiffe_id(certificate)?;
        let (good, expected) = match self {
            Self::Exactly(id) => (actual == *id, id.to_string()),
            Self::TrustDomain(domain) => {
                (actual.trust_domain() == domain, format!("a workload of {domain}"))
            }
        };
        if good { Ok(()) } else { Err(IdentityError::Mismatch { actual, expected }) }
    }
}

fn refused(error: IdentityError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// The one cryptographic provider of the mesh: AWS-LC.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn root_store(roots: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    Ok(Arc::new(store))
}

/// A client configuration that presents the SVID and accepts only `peer`. ALPN is the caller's to set.
///
/// # Errors
/// When the key does not fit the certificate or a root cannot be read.
pub fn client_config(material: &TlsMaterial, peer: Peer) -> Result<ClientConfig, Error> {
    let verifier = SpiffeServerVerifier::new(root_store(&material.roots)?, peer);
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(material.chain.clone(), material.key.clone_key())
}

/// A client configuration for first contact: no certificate of its own, and only a server whose chain ends
/// in a CA with this SHA-256 (as a join token carries it) and that is the control plane.
///
/// # Errors
/// When TLS 1.3 is not available.
pub fn first_contact_config(ca_sha256: [u8; 32]) -> Result<ClientConfig, Error> {
    let verifier =
        PinnedCaVerifier { ca_sha256, algorithms: provider().signature_verification_algorithms };
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

/// A server configuration that presents the SVID and accepts workloads of its own trust domain. With
/// `anonymous`, clients without a certificate are accepted too: the caller must then look who it is.
///
/// # Errors
/// When the key does not fit the certificate or a root cannot be read.
pub fn server_config(material: &TlsMaterial, anonymous: bool) -> Result<ServerConfig, Error> {
    let roots = root_store(&material.roots)?;
    let builder = WebPkiClientVerifier::builder_with_provider(roots, provider());
    let builder = if anonymous { builder.allow_unauthenticated() } else { builder };
    let chain = builder.build().map_err(|err| Error::General(err.to_string()))?;
    let peer = Peer::TrustDomain(material.id.trust_domain().to_owned());
    let verifier = SpiffeClientVerifier { chain, peer };
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(material.chain.clone(), material.key.clone_key())
}

#[derive(Debug)]
struct SpiffeServerVerifier {
    roots: Arc<RootCertStore>,
    peer: Peer,
    algorithms: WebPkiSupportedAlgorithms,
}

impl SpiffeServerVerifier {
    fn new(roots: Arc<RootCertStore>, peer: Peer) -> Self {
        Self { roots, peer, algorithms: provider().signature_verification_algorithms }
    }
}

impl ServerCertVerifier for SpiffeServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let leaf = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &leaf,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        self.peer.check(end_entity).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct PinnedCaVerifier {
    ca_sha256: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedCaVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pinned = |der: &&CertificateDer<'_>| sha256(der) == self.ca_sha256;
        let Some(root) = intermediates.iter().find(pinned) else {
            return Err(refused(IdentityError::CaHash));
        };
        let actual = spiffe_id(end_entity).map_err(refused)?;
        let expected = SpiffeId::control_plane(actual.trust_domain())
            .map_err(|err| refused(IdentityError::Spiffe(err)))?;
        let roots = root_store(&[root.clone().into_owned()])?;
        SpiffeServerVerifier::new(roots, Peer::Exactly(expected)).verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct SpiffeClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    peer: Peer,
}

impl ClientCertVerifier for SpiffeClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        self.peer.check(end_entity).map_err(refused)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// SHA-256, as join tokens carry it of the CA certificate.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA256, bytes).as_ref());
    hash
}

/// When a certificate starts and ends, seconds since the Unix epoch.
///
/// # Errors
/// When it is not an X.509 certificate.
pub fn validity(certificate: &CertificateDer<'_>) -> Result<(i64, i64), IdentityError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|_err| IdentityError::Parse)?;
    Ok((parsed.validity.not_before.timestamp(), parsed.validity.not_after.timestamp()))
}
