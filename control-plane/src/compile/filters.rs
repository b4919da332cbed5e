//! Route filters → what the sidecar applies. What does not fit together was refused by [`super::lint`] before.

use duet_api::proto;
use duet_api::proto::filter::Kind;
use duet_api::proto::path_modifier::Kind as PathKind;
use duet_api::resource::{
    FilterType, HeaderModifier, HttpFilter, PathModifier, PathModifierType, RedirectFilter,
    UrlRewriteFilter,
};

/// Filters in the order given.
pub(super) fn filters(filters: &[HttpFilter]) -> Vec<proto::Filter> {
    filters.iter().filter_map(|filter| Some(proto::Filter { kind: Some(kind(filter)?) })).collect()
}

fn kind(filter: &HttpFilter) -> Option<Kind> {
    Some(match filter.kind {
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
