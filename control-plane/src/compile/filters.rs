//! Route filters → what the sidecar applies. What does not fit together was refused by [`super::lint`] before.

use duet_api::proto;
use duet_api::proto::filter::Kind;
use duet_api::proto::path_modifier::Kind as PathKind;
use duet_api::resource::{
    BackendRef, CorsFilter, FilterType, HeaderModifier, HttpFilter, MirrorFilter, PathModifier,
    PathModifierType, RedirectFilter, UrlRewriteFilter,
};

/// Seconds that a browser remembers an answer where nobody says (Gateway API).
const MAX_AGE: u32 = 5;

/// Filters in the order given. `backend` names what a mirror sends to; `None` where that is broken.
pub(super) fn filters(
    filters: &[HttpFilter],
    mut backend: impl FnMut(&BackendRef) -> Option<String>,
) -> Vec<proto::Filter> {
    let kinds = filters.iter().filter_map(|filter| kind(filter, &mut backend));
    kinds.map(|kind| proto::Filter { kind: Some(kind) }).collect()
}

/// Policies that filters refer to are applied by [`super::policy`].
fn kind(
    filter: &HttpFilter,
    backend: &mut impl FnMut(&BackendRef) -> Option<String>,
) -> Option<Kind> {
    Some(match filter.kind {
        FilterType::RequestMirror => {
            let mirror_filter = filter.request_mirror.as_ref()?;
            Kind::Mirror(mirror(mirror_filter, backend(&mirror_filter.backend_ref)?))
        }
        FilterType::Cors => Kind::Cors(cors(filter.cors.as_ref()?)),
        FilterType::ExtensionRef => return None,
        FilterType::RequestHeaderModifier => {
            Kind::RequestHeaders(headers(filter.request_header_modifier.as_ref()?))
        }
        FilterType::ResponseHeaderModifier => {
            Kind::ResponseHeaders(headers(filter.response_header_modifier.as_ref()?))
        }
        FilterType::RequestRedirect => Kind::Redirect(redirect(filter.request_redirect.as_ref()?)),
        FilterType::UrlRewrite => Kind::UrlRewrite(rewrite(filter.url_rewrite.as_ref()?)),
    })
}

/// All requests, a percentage, or a fraction of them.
fn mirror(filter: &MirrorFilter, backend: String) -> proto::Mirror {
    let (numerator, denominator) = match (filter.percent, filter.fraction) {
        (Some(percent), _) => (percent, 100),
        (None, Some(fraction)) => (fraction.numerator, fraction.denominator),
        (None, None) => (1, 1),
    };
    proto::Mirror { backend, numerator, denominator }
}

fn cors(filter: &CorsFilter) -> proto::Cors {
    proto::Cors {
        allow_origins: filter.allow_origins.clone(),
        allow_credentials: filter.allow_credentials.unwrap_or(false),
        allow_methods: filter.allow_methods.clone(),
        allow_headers: filter.allow_headers.clone(),
        expose_headers: filter.expose_headers.clone(),
        max_age: filter.max_age.unwrap_or(MAX_AGE),
    }
}

fn headers(modifier: &HeaderModifier) -> proto::HeaderModifier {
    let pairs = |headers: &[duet_api::resource::HttpHeader]| {
        let pairs = headers.iter().map(|header| proto::Header {
            name: header.name.to_ascii_lowercase(),
            value: header.value.clone(),
        });
        pairs.collect()
    };
    proto::HeaderModifier {
        set: pairs(&modifier.set),
        add: pairs(&modifier.add),
        remove: modifier.remove.iter().map(|name| name.to_ascii_lowercase()).collect(),
    }
}

fn redirect(filter: &RedirectFilter) -> proto::Redirect {
    proto::Redirect {
        scheme: filter.scheme.clone().unwrap_or_default(),
        hostname: filter.hostname.clone().unwrap_or_default(),
        path: filter.path.as_ref().and_then(path),
        port: filter.port.map(u32::from).unwrap_or_default(),
        status: filter.status_code.map_or(302, u32::from),
    }
}

fn rewrite(filter: &UrlRewriteFilter) -> proto::UrlRewrite {
    proto::UrlRewrite {
        hostname: filter.hostname.clone().unwrap_or_default(),
        path: filter.path.as_ref().and_then(path),
    }
}

fn path(modifier: &PathModifier) -> Option<proto::PathModifier> {
    let kind = match modifier.kind {
        PathModifierType::ReplaceFullPath => {
            PathKind::ReplaceFull(modifier.replace_full_path.clone()?)
        }
        PathModifierType::ReplacePrefixMatch => {
            PathKind::ReplacePrefix(modifier.replace_prefix_match.clone()?)
        }
    };
    Some(proto::PathModifier { kind: Some(kind) })
}
