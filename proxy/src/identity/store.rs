//! The certificate on disk, so that a restart needs neither a token nor the control plane.

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use duet_api::tls::{TlsMaterial, sha256, spiffe_id};
use duet_api::token::JoinClaims;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::Svid;

/// Key and chain.
const SVID: &str = "svid.pem";
/// Roots.
const BUNDLE: &str = "trust-bundle.pem";

/// A folder of mode 0700 that keeps the certificate, and what else a restart must not forget.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// Makes the folder where it does not exist.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("state folder {}", folder.display()))?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Where.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What is stored. Damaged files are reported and count as none.
    #[must_use]
    pub fn load(&self) -> Option<Svid> {
        if !self.folder.join(SVID).exists() {
            return None;
        }
        self.read()
            .inspect_err(|error| {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the stored certificate is not usable"
                );
            })
            .ok()
    }

    fn read(&self) -> anyhow::Result<Svid> {
        let (svid, bundle) = (self.folder.join(SVID), self.folder.join(BUNDLE));
        let text = fs::read(&svid).with_context(|| svid.display().to_string())?;
        let key = PrivateKeyDer::from_pem_slice(&text).context("private key")?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>()?;
        let roots: Vec<_> = CertificateDer::pem_file_iter(&bundle)
            .and_then(Iterator::collect)
            .with_context(|| bundle.display().to_string())?;
        let leaf = chain.first().context("no certificate in it")?;
        let id = spiffe_id(leaf)?;
        let (not_before, not_after) = validity(leaf)?;
        let material = TlsMaterial { chain, key, roots, id };
        duet_api::tls::server_config(&material, false)?;
        Ok(Svid { material, not_before, not_after })
    }

    /// Replaces what is stored.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, svid: &Svid) -> anyhow::Result<()> {
        let mut text = pem("PRIVATE KEY", svid.material.key.secret_der());
        for certificate in &svid.material.chain {
            text.push_str(&pem("CERTIFICATE", certificate));
        }
        let roots = svid.material.roots.iter().map(|root| pem("CERTIFICATE", root));
        self.write(BUNDLE, &roots.collect::<String>())?;
        self.write(SVID, &text)
    }

    /// Replaces a file, whole or not at all; a machine that crashes afterwards has the new one.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let temporary = self.folder.join(format!("{name}.{}.tmp", std::process::id()));
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .with_context(|| temporary.display().to_string())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, self.folder.join(name))?;
        match fs::File::open(&self.folder)?.sync_all() {
            // There are file systems that cannot.
            Err(error)
                if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) =>
            {
                Ok(())
            }
            synced => Ok(synced?),
        }
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let body = base64_lines(der);
    format!("-----BEGIN {label}-----\n{body}-----END {label}-----\n")
}

fn base64_lines(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut lines = String::with_capacity(text.len() + text.len() / 64 + 1);
    for (index, c) in text.chars().enumerate() {
        if index > 0 && index % 64 == 0 {
            lines.push('\n');
        }
        lines.push(c);
    }
    lines.push('\n');
    lines
}

/// Whether a stored certificate is what this token would give.
pub(super) fn fits(svid: &Svid, claims: &JoinClaims) -> bool {
    let same_ca =
        |root: &CertificateDer<'_>| claims.ca_hash().is_ok_and(|hash| sha256(root) == hash);
    svid.material.id == claims.sub && svid.material.roots.iter().any(same_ca)
}

/// Start and end of a certificate, seconds since the Unix epoch.
pub(super) fn validity(certificate: &CertificateDer<'_>) -> anyhow::Result<(i64, i64)> {
    duet_api::tls::validity(certificate).context("the certificate's validity cannot be read")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, SanType};

    fn svid() -> Svid {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let uri = "spiffe://duet.local/ns/shop/sa/orders";
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        let certificate = params.self_signed(&key).unwrap();
        let material = TlsMaterial {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            roots: vec![certificate.der().clone()],
            id: uri.parse().unwrap(),
        };
        let (not_before, not_after) = validity(certificate.der()).unwrap();
        Svid { material, not_before, not_after }
    }

    #[test]
    fn what_is_saved_loads_and_the_key_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let saved = svid();
        store.save(&saved).unwrap();
        let loaded = store.load().unwrap();
        assert_eq!(loaded.material.id, saved.material.id);
        assert_eq!(loaded.not_after, saved.not_after);
        let mode = fs::metadata(store.folder().join(SVID)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn damaged_files_count_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert!(store.load().is_none());
        store.save(&svid()).unwrap();
        fs::write(folder.path().join(SVID), "-----BEGIN CERTIFICATE-----\nAAAA\n").unwrap();
        assert!(store.load().is_none());
    }
}
