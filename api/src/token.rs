//! Join tokens: how a workload proves who it may be before it has a certificate.
//!
//! A token is a JWT (RFC 7519) signed by the control plane with Ed25519. Besides who may be claimed it carries
//! the SHA-256 of the mesh CA's certificate, so that the holder can verify the control plane before it sends
//! the token. The holder reads the claims without verifying the signature; only the control plane verifies.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::spiffe::SpiffeId;

/// `iss` and `aud` of every join token.
pub const ISSUER: &str = "duet";

/// The claims of a join token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinClaims {
    /// [`ISSUER`].
    pub iss: String,
    /// [`ISSUER`].
    pub aud: String,
    /// The identity that the holder may get a certificate for.
    pub sub: SpiffeId,
    /// Token id (UUID); names the token for revocation and for single use.
    pub jti: String,
    /// Issued at, seconds since the Unix epoch.
    pub iat: u64,
    /// Expires at, seconds since the Unix epoch.
    pub exp: u64,
    /// SHA-256 of the CA certificate's DER, lower-case hex.
    pub ca_sha256: String,
    /// May be used once only.
    #[serde(default)]
    pub single_use: bool,
}

/// Why a token cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not three dot-separated parts.
    #[error("a join token must be a JWT of three parts; this has {0}")]
    Parts(usize),
    /// The middle part is not base64url.
    #[error("the join token's claims are not base64url")]
    Base64(#[from] base64::DecodeError),
    /// The claims are not the JSON expected.
    #[error("the join token's claims are not valid")]
    Claims(#[from] serde_json::Error),
    /// The CA hash is not 64 hex digits.
    #[error("the join token's CA hash is not a SHA-256 in hex")]
    CaHash,
}

impl JoinClaims {
    /// Reads the claims of a token **without verifying its signature**; for the holder of the token.
    ///
    /// # Errors
    /// When the token is not a JWT with these claims.
    pub fn read_unverified(token: &str) -> Result<Self, TokenError> {
        let parts: Vec<&str> = token.trim().split('.').collect();
        let [_, claims, _] = parts.as_slice() else {
            return Err(TokenError::Parts(parts.len()));
        };
        let claims = URL_SAFE_NO_PAD.decode(claims)?;
        Ok(serde_json::from_slice(&claims)?)
    }

    /// The CA hash as bytes.
    ///
    /// # Errors
    /// When it is not 64 hex digits.
    pub fn ca_hash(&self) -> Result<[u8; 32], TokenError> {
        parse_sha256(&self.ca_sha256).ok_or(TokenError::CaHash)
    }
}

/// Lower-case hex of a hash.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
        text.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
        text
    })
}

/// Parses 64 hex digits.
#[must_use]
pub fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> =
        digits.chunks_exact(2).map(|pair| pair.iter().fold(0, |n, d| n << 4 | d)).collect();
    if digits.len() == 64 { bytes.try_into().ok() } else { None }
}

/// The certificates of PEM text, DER, in order; everything else in it is passed over.
///
/// # Errors
/// When a certificate's body is not base64.
pub fn certificates_from_pem(pem: &str) -> Result<Vec<Vec<u8>>, base64::DecodeError> {
    let mut certificates = Vec::new();
    for block in pem.split("-----BEGIN CERTIFICATE-----").skip(1) {
        let body = block.split("-----END").next().unwrap_or_default();
        let body: String = body.chars().filter(|c| !c.is_whitespace()).collect();
        certificates.push(STANDARD.decode(body)?);
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips() {
        let hash = [0xabu8; 32];
        assert_eq!(parse_sha256(&hex(&hash)), Some(hash));
        assert_eq!(parse_sha256("ab"), None);
        assert_eq!(parse_sha256(&"zz".repeat(32)), None);
    }

    #[test]
    fn garbage_tokens_are_refused() {
        for bad in ["", "a.b", "a.!.c", "a.e30.c", "a.bm90anNvbg.c"] {
            assert!(JoinClaims::read_unverified(bad).is_err(), "{bad}");
        }
    }
}
