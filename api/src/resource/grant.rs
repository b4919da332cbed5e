//! Gateway API's `ReferenceGrant`: who may refer into a namespace. A mesh enforces it only where it is asked to
//! (GEP-1294: routes of a mesh need no grant).

use serde::Deserialize;

use super::core::IgnoredEq;
use super::meta::Metadata;

/// Lets resources of other namespaces refer to some of its own.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReferenceGrant {
    #[serde(rename = "apiVersion")]
    pub(super) _api_version: IgnoredEq,
    #[serde(rename = "kind")]
    pub(super) _kind: IgnoredEq,
    /// Name, and the namespace that is referred into.
    pub metadata: Metadata,
    /// Who and what.
    pub spec: ReferenceGrantSpec,
}

/// Spec of a [`ReferenceGrant`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceGrantSpec {
    /// Any of these may refer
    pub from: Vec<GrantFrom>,
    /// to any of these.
    pub to: Vec<GrantTo>,
}

/// Resources of one kind in one namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantFrom {
    /// Such as `gateway.networking.k8s.io`.
    pub group: String,
    /// Such as `HTTPRoute`.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
}

/// Resources of one kind, or one of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantTo {
    /// Empty for `Service`.
    #[serde(default)]
    pub group: String,
    /// Such as `Service`.
    pub kind: String,
    /// Default: all of them.
    pub name: Option<String>,
}

impl ReferenceGrant {
    /// Whether a route of a kind and namespace may refer to a service of the grant's namespace.
    #[must_use]
    pub fn lets(&self, kind: &str, namespace: &str, service: &str) -> bool {
        let from = self.spec.from.iter().any(|from| {
            from.group == "gateway.networking.k8s.io"
                && from.kind == kind
                && from.namespace == namespace
        });
        let to = self.spec.to.iter().any(|to| {
            matches!(to.group.as_str(), "" | "core")
                && to.kind == "Service"
                && to.name.as_deref().is_none_or(|name| name == service)
        });
        from && to
    }
}
