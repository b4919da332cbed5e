//! Join tokens: made, listed and revoked offline on the state folder, also while a control plane runs on it, and
//! verified by that control plane. Imports [`crate::ca`] and [`crate::revoked`].
//!
//! The folder `tokens/` (mode 0700) holds one record for each token, `<id>.json`, and a marker file for what happened
//! to it: `<id>.used`, `<id>.revoked`. Markers are created exclusively and flushed, so that of two uses of a
//! single-use token exactly one wins, across processes and crashes, without a lock. The token itself is not kept.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use duet_api::spiffe::SpiffeId;
use duet_api::token::{ISSUER, JoinClaims};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};

use crate::ca::Ca;
use crate::revoked;

/// What a new token should be good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRequest {
    /// Namespace that the holder may join.
    pub namespace: String,
    /// Service account that the holder gets.
    pub service_account: String,
    /// How long the token can be used.
    pub lifetime: Duration,
    /// One use only.
    pub single_use: bool,
    /// The mesh's trust domain.
    pub trust_domain: String,
}

/// A token that was made, without its secret part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// What it says.
    pub claims: JoinClaims,
    /// Used at least once, as far as that matters: recorded for single-use tokens only.
    pub used: bool,
    /// Revoked.
    pub revoked: bool,
    /// Past its time.
    pub expired: bool,
}

/// Why a token was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenRefusal {
    /// Not one of ours: garbage, another signature, another audience.
    #[error("the join token is not valid: {0}")]
    Invalid(String),
    /// Too old.
    #[error("the join token has expired; create a new one with `duet token create`")]
    Expired,
    /// Taken back.
    #[error("the join token was revoked")]
    Revoked,
    /// Single-use, and used.
    #[error("the join token is for a single use and was used before")]
    Used,
    /// The state folder failed; says nothing about the token.
    #[error("the control plane cannot look up join tokens")]
    Store(#[source] io::Error),
}

impl TokenRefusal {
    /// A short word, for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "token_invalid",
            Self::Expired => "token_expired",
            Self::Revoked => "token_revoked",
            Self::Used => "token_used",
            Self::Store(_) => "internal",
        }
    }
}

/// Makes a token, and the CA of the state folder if there is none yet.
///
/// # Errors
/// When the request names no valid identity or the state folder cannot be used.
pub fn create(state: &Path, request: &TokenRequest) -> anyhow::Result<String> {
    let sub = SpiffeId::new(&request.trust_domain, &request.namespace, &request.service_account)?;
    ensure!(!sub.is_control_plane(), "{sub} is the control plane's own identity");
    ensure!(!request.lifetime.is_zero(), "a join token needs a lifetime");
    let ca = Ca::open_or_create(state, &request.trust_domain)?;
    let identity = revoked::Identity::from(&sub);
    ensure!(!identity.is_revoked(state)?, "{identity} was revoked, and could not use a token");
    let iat = now()?;
    let claims = JoinClaims {
        iss: ISSUER.to_owned(),
        aud: ISSUER.to_owned(),
        sub,
        jti: uuid::Uuid::new_v4().to_string(),
        iat,
        exp: iat.saturating_add(request.lifetime.as_secs().max(1)),
        ca_sha256: ca.fingerprint(),
        single_use: request.single_use,
    };
    let key = EncodingKey::from_ed_der(ca.token_key().serialized_der());
    let token = jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &key)
        .context("cannot sign the token")?;
    let dir = tokens_dir(state)?;
    prune(&dir, iat)?;
    let record = serde_json::to_string_pretty(&claims)?;
    write_new(&dir.join(format!("{}.json", claims.jti)), &record)?;
    Ok(token)
}

/// Every token that was made and has not been forgotten, oldest first. Tokens are forgotten a day after they expire.
///
/// # Errors
/// When the state folder cannot be read.
pub fn list(state: &Path) -> anyhow::Result<Vec<TokenInfo>> {
    let dir = state.join("tokens");
    let now = now()?;
    let mut found = Vec::new();
    for claims in records(&dir)? {
        let marked = |what: &str| dir.join(format!("{}.{what}", claims.jti)).exists();
        found.push(TokenInfo {
            used: marked("used"),
            revoked: marked("revoked"),
            expired: claims.exp <= now,
            claims,
        });
    }
    found.sort_by(|a, b| (a.claims.iat, &a.claims.jti).cmp(&(b.claims.iat, &b.claims.jti)));
    Ok(found)
}

/// Takes a token back, by its id. Certificates that it led to are renewed all the same: who is to be shut out has to be
/// revoked, with [`revoked::revoke`].
///
/// # Errors
/// When there is no such token or the state folder cannot be written.
pub fn revoke(state: &Path, id: &str) -> anyhow::Result<()> {
    let dir = state.join("tokens");
    let id = uuid::Uuid::parse_str(id).with_context(|| format!("{id:?} is not a token's id"))?;
    ensure!(dir.join(format!("{id}.json")).exists(), "no token has the id {id}");
    match write_new(&dir.join(format!("{id}.revoked")), "") {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error.into()),
        _ => Ok(()),
    }
}

/// Checks a token that somebody presents. Does not use it up: that is [`spend`], after everything else is checked.
///
/// # Errors
/// When the token is not to be accepted.
pub fn verify(state: &Path, ca: &Ca, token: &str) -> Result<JoinClaims, TokenRefusal> {
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.leeway = 0;
    validation.set_audience(&[ISSUER]);
    validation.set_issuer(&[ISSUER]);
    validation.set_required_spec_claims(&["exp", "aud", "iss"]);
    let key = DecodingKey::from_ed_der(ca.token_key().public_key_raw());
    let claims = jsonwebtoken::decode::<JoinClaims>(token.trim(), &key, &validation)
        .map_err(|error| {
            if matches!(error.kind(), ErrorKind::ExpiredSignature) {
                TokenRefusal::Expired
            } else {
                TokenRefusal::Invalid(error.to_string())
            }
        })?
        .claims;
    let invalid = |why: &str| Err(TokenRefusal::Invalid(why.to_owned()));
    // The id becomes a file's name.
    if uuid::Uuid::parse_str(&claims.jti).map(|id| id.to_string()).ok().as_ref()
        != Some(&claims.jti)
    {
        return invalid("its id is not a UUID");
    }
    if claims.sub.trust_domain() != ca.trust_domain() || claims.sub.is_control_plane() {
        return invalid("its subject cannot join this mesh");
    }
    let marked = |what: &str| {
        let path = state.join("tokens").join(format!("{}.{what}", claims.jti));
        path.try_exists().map_err(TokenRefusal::Store)
    };
    if marked("revoked")? {
        return Err(TokenRefusal::Revoked);
    }
    if claims.single_use && marked("used")? {
        return Err(TokenRefusal::Used);
    }
    Ok(claims)
}

/// Uses up a single-use token, durably; reusable tokens stay as they are.
///
/// # Errors
/// [`TokenRefusal::Used`] when somebody else was first.
pub fn spend(state: &Path, claims: &JoinClaims) -> Result<(), TokenRefusal> {
    if !claims.single_use {
        return Ok(());
    }
    let dir = tokens_dir(state).map_err(TokenRefusal::Store)?;
    write_new(&dir.join(format!("{}.used", claims.jti)), "").map_err(|error| {
        if error.kind() == io::ErrorKind::AlreadyExists {
            TokenRefusal::Used
        } else {
            TokenRefusal::Store(error)
        }
    })
}

fn now() -> anyhow::Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs())
}

fn tokens_dir(state: &Path) -> io::Result<PathBuf> {
    let dir = state.join("tokens");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
    Ok(dir)
}

/// Creates the file with its content and makes both survive a crash.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
}

/// Readable records; a record that a crash cut short names no token that anybody was given.
fn records(dir: &Path) -> anyhow::Result<Vec<JoinClaims>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| dir.display().to_string())?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            found
                .extend(fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()));
        }
    }
    Ok(found)
}

/// Forgets tokens that nobody can use any more, a day late so that `list` can still explain them.
fn prune(dir: &Path, now: u64) -> anyhow::Result<()> {
    for claims in records(dir)? {
        if claims.exp.saturating_add(86_400) < now && uuid::Uuid::parse_str(&claims.jti).is_ok() {
            for what in ["used", "revoked", "json"] {
                match fs::remove_file(dir.join(format!("{}.{what}", claims.jti))) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(error.into());
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> TokenRequest {
        TokenRequest {
            namespace: "shop".into(),
            service_account: "orders".into(),
            lifetime: Duration::from_secs(3600),
            single_use: false,
            trust_domain: "duet.local".into(),
        }
    }

    #[test]
    fn a_token_proves_what_it_was_made_for() {
        let state = tempfile::tempdir().unwrap();
        let token = create(state.path(), &request()).unwrap();
        let ca = Ca::open_or_create(state.path(), "duet.local").unwrap();
        let claims = verify(state.path(), &ca, &token).unwrap();
        assert_eq!(claims.sub.to_string(), "spiffe://duet.local/ns/shop/sa/orders");
        assert_eq!(claims.ca_sha256, ca.fingerprint());
        assert_eq!(JoinClaims::read_unverified(&token).unwrap(), claims);
        for _ in 0..2 {
            spend(state.path(), &claims).unwrap();
        }
    }

    #[test]
    fn a_single_use_token_is_used_once() {
        let state = tempfile::tempdir().unwrap();
        let token = create(state.path(), &TokenRequest { single_use: true, ..request() }).unwrap();
        let ca = Ca::open_or_create(state.path(), "duet.local").unwrap();
        let claims = verify(state.path(), &ca, &token).unwrap();
        spend(state.path(), &claims).unwrap();
        assert!(matches!(spend(state.path(), &claims), Err(TokenRefusal::Used)));
        assert!(matches!(verify(state.path(), &ca, &token), Err(TokenRefusal::Used)));
        assert!(list(state.path()).unwrap()[0].used);
    }

    #[test]
    fn a_revoked_token_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let token = create(state.path(), &request()).unwrap();
        let ca = Ca::open_or_create(state.path(), "duet.local").unwrap();
        let id = list(state.path()).unwrap()[0].claims.jti.clone();
        revoke(state.path(), &id).unwrap();
        revoke(state.path(), &id).unwrap();
        assert!(matches!(verify(state.path(), &ca, &token), Err(TokenRefusal::Revoked)));
        assert!(revoke(state.path(), "../../etc/passwd").is_err());
        assert!(revoke(state.path(), &uuid::Uuid::new_v4().to_string()).is_err());
    }

    #[test]
    fn forged_and_foreign_tokens_are_refused() {
        let (state, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let foreign = create(other.path(), &request()).unwrap();
        let own = create(state.path(), &request()).unwrap();
        let ca = Ca::open_or_create(state.path(), "duet.local").unwrap();
        // Another character anywhere: in the header, the claims or the signature.
        let changed = own.char_indices().filter(|(_, c)| *c != '.').map(|(at, c)| {
            let other = if c == 'A' { "B" } else { "A" };
            let mut token = own.clone();
            token.replace_range(at..=at, other);
            token
        });
        for bad in changed {
            assert!(verify(state.path(), &ca, &bad).is_err(), "{bad} is not {own}");
        }
        // Another algorithm in the header must not be believed.
        let hs = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &verify(state.path(), &ca, &own).unwrap(),
            &EncodingKey::from_secret(ca.token_key().public_key_raw()),
        )
        .unwrap();
        for bad in ["", "a.b.c", &foreign, &hs] {
            let refusal = verify(state.path(), &ca, bad).unwrap_err();
            assert_eq!(refusal.reason(), "token_invalid", "{bad}");
        }
    }

    #[test]
    fn the_control_planes_identity_is_not_given_away() {
        let state = tempfile::tempdir().unwrap();
        let request = TokenRequest {
            namespace: duet_api::spiffe::SYSTEM_NAMESPACE.into(),
            service_account: duet_api::spiffe::CONTROL_PLANE_ACCOUNT.into(),
            ..request()
        };
        assert!(create(state.path(), &request).is_err());
    }
}
