//! The mesh's certificate authority: made on first start, kept in the state folder, signs SVIDs. Beside the CA lies
//! the key that signs join tokens. Imports nothing of this crate.
//!
//! The folder `ca/` (mode 0700) holds `ca.pem`, `ca-key.pem` (0600) and `token-key.pem` (0600). It is written
//! elsewhere first and then renamed as a whole, so that two processes that start at once end with the same CA and
//! a crash leaves no half of one.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use duet_api::spiffe::SpiffeId;
use duet_api::tls::{self, TlsMaterial};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{ASN1Time, FromDer as _, GeneralName, X509Certificate};

/// How long an SVID is valid.
pub const SVID_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Certificates start this much in the past, for machines whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A P-256 request has about 200 bytes, RSA 4096 about 1100.
const MAX_CSR_BYTES: usize = 16 << 10;

/// The CA with its keys.
pub struct Ca {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    token_key: KeyPair,
    trust_domain: String,
    not_after: SystemTime,
}

/// A signed SVID.
#[derive(Clone, Debug)]
pub struct Svid {
    /// The certificate, DER.
    pub certificate: CertificateDer<'static>,
    /// How long it is valid from now.
    pub lifetime: Duration,
}

/// Why a signing request was refused. The text is for the caller.
#[derive(Debug, thiserror::Error)]
#[error("certificate signing request: {0}")]
pub struct CsrError(String);

impl Ca {
    /// Opens the CA of a state folder, or makes one where there is none.
    ///
    /// # Errors
    /// When the folder cannot be used, the CA there is damaged or is of another trust domain.
    pub fn open_or_create(state: &Path, trust_domain: &str) -> anyhow::Result<Self> {
        SpiffeId::control_plane(trust_domain).context("the trust domain is not usable")?;
        let dir = state.join("ca");
        if !dir.join("ca.pem").exists() {
            create(state, &dir, trust_domain)
                .with_context(|| format!("cannot create the mesh CA in {}", dir.display()))?;
        }
        let ca = Self::load(&dir)
            .with_context(|| format!("cannot use the mesh CA in {}", dir.display()))?;
        ensure!(
            ca.trust_domain == trust_domain,
            "the mesh CA in {} is of the trust domain {}, not {trust_domain}; use that, or another \
             state folder",
            dir.display(),
            ca.trust_domain,
        );
        Ok(ca)
    }

    fn load(dir: &Path) -> anyhow::Result<Self> {
        let pem = read(&dir.join("ca.pem"))?;
        let mut certificates = duet_api::token::certificates_from_pem(&pem)
            .context("ca.pem is not valid PEM")?
            .into_iter();
        let certificate =
            CertificateDer::from(certificates.next().context("ca.pem has no certificate")?);
        let key = KeyPair::from_pem(&read_key(&dir.join("ca-key.pem"))?)
            .context("ca-key.pem is not a private key")?;
        let token_key = KeyPair::from_pem(&read_key(&dir.join("token-key.pem"))?)
            .context("token-key.pem is not a private key")?;
        ensure!(
            token_key.algorithm() == &rcgen::PKCS_ED25519,
            "token-key.pem is not an Ed25519 key"
        );
        let (trust_domain, not_after) = facts(&certificate, &key)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key).context("ca.pem is not usable")?;
        Ok(Self { certificate, issuer, token_key, trust_domain, not_after })
    }

    /// The CA certificate, DER; the whole trust bundle.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The Ed25519 key that signs join tokens.
    #[must_use]
    pub fn token_key(&self) -> &KeyPair {
        &self.token_key
    }

    /// Signs an SVID for the public key of a PKCS#10 request. Nothing else in the request is used; its signature
    /// proves that the caller holds the key.
    ///
    /// # Errors
    /// When the request cannot be read or is not signed by its own key.
    pub fn sign_request(&self, csr: &[u8], id: &SpiffeId) -> Result<Svid, CsrError> {
        if csr.len() > MAX_CSR_BYTES {
            return Err(CsrError(format!("has {} bytes, more than {MAX_CSR_BYTES}", csr.len())));
        }
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))
                .map_err(|error| CsrError(error.to_string()))?;
        self.sign(&request.public_key, id).map_err(|error| CsrError(error.to_string()))
    }

    fn sign(&self, key: &impl PublicKeyData, id: &SpiffeId) -> anyhow::Result<Svid> {
        let now = SystemTime::now();
        let not_after = (now + SVID_LIFETIME).min(self.not_after);
        let lifetime = not_after.duration_since(now).unwrap_or_default();
        ensure!(!lifetime.is_zero(), "the mesh CA has expired");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serial_number = Some(serial());
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = asn1(now - CLOCK_SKEW)?.to_datetime();
        params.not_after = asn1(not_after)?.to_datetime();
        let certificate = params.signed_by(key, &self.issuer)?;
        Ok(Svid { certificate: certificate.der().clone(), lifetime })
    }

    /// A fresh key with an SVID for the control plane itself. The chain carries the CA certificate too: a sidecar's
    /// first contact finds there the CA that its join token names.
    ///
    /// # Errors
    /// When signing fails.
    pub fn control_plane_material(&self) -> anyhow::Result<(TlsMaterial, Duration)> {
        let id = SpiffeId::control_plane(&self.trust_domain)?;
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let svid = self.sign(&key, &id)?;
        let material = TlsMaterial {
            chain: vec![svid.certificate, self.certificate.clone()],
            key: key.into(),
            roots: vec![self.certificate.clone()],
            id,
        };
        Ok((material, svid.lifetime))
    }

    /// SHA-256 of the CA certificate, lower-case hex, as join tokens carry it.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        duet_api::token::hex(&tls::sha256(&self.certificate))
    }
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

/// A random positive serial number of 16 bytes (RFC 5280 4.1.2.2).
fn serial() -> SerialNumber {
    let mut bytes = uuid::Uuid::new_v4().into_bytes();
    if let Some(first) = bytes.first_mut() {
        *first = (*first & 0x7f) | 0x40;
    }
    SerialNumber::from_slice(&bytes)
}

fn asn1(time: SystemTime) -> anyhow::Result<ASN1Time> {
    let seconds = time.duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
    Ok(ASN1Time::from_timestamp(i64::try_from(seconds)?)?)
}

/// Trust domain and end of a CA certificate, after a check that the key is its own.
fn facts(certificate: &CertificateDer<'_>, key: &KeyPair) -> anyhow::Result<(String, SystemTime)> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).context("ca.pem is not an X.509 certificate")?;
    ensure!(parsed.is_ca(), "ca.pem is not a CA certificate");
    ensure!(
        parsed.public_key().subject_public_key.data.as_ref() == key.public_key_raw(),
        "ca-key.pem is not the key of ca.pem"
    );
    let names = parsed.subject_alternative_name()?.map(|names| &names.value.general_names);
    let trust_domain = names.into_iter().flatten().find_map(|name| {
        let GeneralName::URI(uri) = name else {
            return None;
        };
        uri.strip_prefix("spiffe://")
    });
    let Some(trust_domain) = trust_domain else { bail!("ca.pem names no SPIFFE trust domain") };
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
    Ok((trust_domain.to_owned(), UNIX_EPOCH + Duration::from_secs(seconds)))
}

fn create(state: &Path, dir: &Path, trust_domain: &str) -> anyhow::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state)?;
    let fresh = state.join(format!("ca.new-{}", uuid::Uuid::new_v4()));
    let outcome = write_new(&fresh, trust_domain).and_then(|()| {
        match fs::rename(&fresh, dir) {
            Ok(()) => sync_dir(state).map_err(Into::into),
            // Another process was first; its CA is the mesh's.
            Err(_) if dir.join("ca.pem").exists() => Ok(()),
            Err(error) => Err(error.into()),
        }
    });
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    outcome
}

fn write_new(dir: &Path, trust_domain: &str) -> anyhow::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(dir)?;
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("Duet mesh CA of {trust_domain}"));
    params.serial_number = Some(serial());
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = asn1(now - CLOCK_SKEW)?.to_datetime();
    params.not_after = asn1(now + CA_LIFETIME)?.to_datetime();
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let token_key = KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let certificate = params.self_signed(&key)?;
    write_file(&dir.join("ca.pem"), &certificate.pem(), 0o644)?;
    write_file(&dir.join("ca-key.pem"), &key.serialize_pem(), 0o600)?;
    write_file(&dir.join("token-key.pem"), &token_key.serialize_pem(), 0o600)?;
    Ok(sync_dir(dir)?)
}

fn write_file(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Makes new names in a folder survive a crash.
fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

fn read(path: &PathBuf) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// Reads a private key, and warns when others can read it too.
fn read_key(path: &PathBuf) -> anyhow::Result<String> {
    let mode = fs::metadata(path).with_context(|| path.display().to_string())?.permissions().mode();
    if mode & 0o077 != 0 {
        let mode = format!("{:o}", mode & 0o777);
        tracing::warn!(file = %path.display(), mode, "a private key can be read by others; chmod 600");
    }
    read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csr(key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.serialize_request(key).unwrap().der().to_vec()
    }

    fn id() -> SpiffeId {
        SpiffeId::new("duet.local", "shop", "orders").unwrap()
    }

    #[test]
    fn keys_are_for_the_owner_only() {
        let state = tempfile::tempdir().unwrap();
        Ca::open_or_create(state.path(), "duet.local").unwrap();
        let mode = |name: &str| {
            fs::metadata(state.path().join(name)).unwrap().permissions().mode() & 0o777
        };
        assert_eq!(mode("ca"), 0o700);
        assert_eq!(mode("ca/ca-key.pem"), 0o600);
        assert_eq!(mode("ca/token-key.pem"), 0o600);
    }

    #[test]
    fn the_ca_stays_the_same_and_belongs_to_one_trust_domain() {
        let state = tempfile::tempdir().unwrap();
        let first = Ca::open_or_create(state.path(), "duet.local").unwrap();
        let second = Ca::open_or_create(state.path(), "duet.local").unwrap();
        assert_eq!(first.fingerprint(), second.fingerprint());
        let error = Ca::open_or_create(state.path(), "other.test").unwrap_err();
        assert!(error.to_string().contains("of the trust domain duet.local"), "{error}");
    }

    #[test]
    fn processes_that_race_end_with_one_ca() {
        let state = tempfile::tempdir().unwrap();
        let prints: Vec<String> = std::thread::scope(|scope| {
            let open = || Ca::open_or_create(state.path(), "duet.local").unwrap().fingerprint();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(prints.windows(2).all(|pair| pair[0] == pair[1]));
        let left: Vec<_> = fs::read_dir(state.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn an_svid_has_the_callers_key_and_our_name_only() {
        let state = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(state.path(), "duet.local").unwrap();
        let key = KeyPair::generate().unwrap();
        let svid = ca.sign_request(&csr(&key), &id()).unwrap();
        assert_eq!(tls::spiffe_id(&svid.certificate).unwrap(), id());
        let (_, parsed) = X509Certificate::from_der(&svid.certificate).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
        assert_eq!(
            parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(),
            1
        );
        assert_eq!(svid.lifetime, SVID_LIFETIME);
        let again = ca.sign_request(&csr(&key), &id()).unwrap();
        let (_, other) = X509Certificate::from_der(&again.certificate).unwrap();
        assert_ne!(parsed.raw_serial(), other.raw_serial());
    }

    #[test]
    fn requests_that_prove_nothing_are_refused() {
        let state = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(state.path(), "duet.local").unwrap();
        let mut forged = csr(&KeyPair::generate().unwrap());
        *forged.last_mut().unwrap() ^= 1;
        for bad in [Vec::new(), vec![0; 40], vec![0x30; 20_000], forged] {
            assert!(ca.sign_request(&bad, &id()).is_err());
        }
    }

    #[test]
    fn a_key_that_is_not_the_cas_is_found() {
        let state = tempfile::tempdir().unwrap();
        Ca::open_or_create(state.path(), "duet.local").unwrap();
        let key = KeyPair::generate().unwrap().serialize_pem();
        fs::write(state.path().join("ca/ca-key.pem"), key).unwrap();
        let error = format!("{:#}", Ca::open_or_create(state.path(), "duet.local").unwrap_err());
        assert!(error.contains("ca-key.pem is not the key of ca.pem"), "{error}");
    }
}
