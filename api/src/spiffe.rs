//! SPIFFE identities in Duet's form: `spiffe://<trust-domain>/ns/<namespace>/sa/<account>`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Namespace of the mesh's own workloads.
pub const SYSTEM_NAMESPACE: &str = "duet-system";
/// Service account of the control plane, in [`SYSTEM_NAMESPACE`].
pub const CONTROL_PLANE_ACCOUNT: &str = "duet-control-plane";

/// A workload's identity. Every part is non-empty and of the characters that SPIFFE-ID section 2 allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    trust_domain: String,
    namespace: String,
    account: String,
}

/// Why a string is not a [`SpiffeId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// Not of the form at all.
    #[error("{0:?} is not of the form spiffe://<trust-domain>/ns/<namespace>/sa/<account>")]
    Form(String),
    /// A part has a character that is not allowed there, or is empty or too long.
    #[error(
        "{part} {value:?} in a SPIFFE id must be 1 to 253 characters of a-z, 0-9, '.', '-' and '_'"
    )]
    Part {
        /// Which part.
        part: &'static str,
        /// What it was.
        value: String,
    },
}

fn check(part: &'static str, value: &str) -> Result<String, SpiffeError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
    let dots_only = value.chars().all(|c| c == '.');
    if value.len() > 253 || dots_only || !value.chars().all(allowed) {
        return Err(SpiffeError::Part { part, value: value.to_owned() });
    }
    Ok(value.to_owned())
}

impl SpiffeId {
    /// Builds an identity from its parts.
    ///
    /// # Errors
    /// When a part is empty, too long or has a character that SPIFFE does not allow.
    pub fn new(trust_domain: &str, namespace: &str, account: &str) -> Result<Self, SpiffeError> {
        Ok(Self {
            trust_domain: check("trust domain", trust_domain)?,
            namespace: check("namespace", namespace)?,
            account: check("account", account)?,
        })
    }

    /// The identity of the control plane of a trust domain.
    ///
    /// # Errors
    /// When the trust domain is not valid.
    pub fn control_plane(trust_domain: &str) -> Result<Self, SpiffeError> {
        Self::new(trust_domain, SYSTEM_NAMESPACE, CONTROL_PLANE_ACCOUNT)
    }

    /// Whether this is a control plane's identity.
    #[must_use]
    pub fn is_control_plane(&self) -> bool {
        self.namespace == SYSTEM_NAMESPACE && self.account == CONTROL_PLANE_ACCOUNT
    }

    /// The trust domain, without the scheme.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The service account.
    #[must_use]
    pub fn account(&self) -> &str {
        &self.account
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.account)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let form = || SpiffeError::Form(s.chars().take(300).collect());
        let rest = s.strip_prefix("spiffe://").ok_or_else(form)?;
        let parts: Vec<&str> = rest.split('/').collect();
        match parts.as_slice() {
            [domain, "ns", namespace, "sa", account] => Self::new(domain, namespace, account),
            _ => Err(form()),
        }
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = SpiffeError;

    fn try_from(value: String) -> Result<Self, Self::Error> {
        value.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let id = SpiffeId::new("duet.local", "shop", "orders").unwrap();
        assert_eq!(id.to_string(), "spiffe://duet.local/ns/shop/sa/orders");
        assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id);
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in [
            "",
            "spiffe://",
            "https://duet.local/ns/a/sa/b",
            "spiffe://duet.local/ns/a/sa/",
            "spiffe://duet.local/ns/../sa/b",
            "spiffe://duet.local/ns/a/sa/b/c",
            "spiffe://duet.local/ns/A/sa/b",
            "spiffe://duet.local:80/ns/a/sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }
}
