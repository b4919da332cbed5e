//! Filters that do not fit together.

use duet_api::resource::{
    CorsFilter, FilterType, Fraction, HeaderModifier, HttpFilter, HttpRule, MirrorFilter,
    PathMatchType, PathModifier, PathModifierType,
};

use super::Lint;
use duet_api::resource::Field;

impl Lint<'_> {
    pub(super) fn filters(&mut self, filters: &[HttpFilter]) {
        let kinds: Vec<FilterType> = filters.iter().map(|filter| filter.kind).collect();
        self.path.push(Field::Name("filters"));
        for (number, filter) in filters.iter().enumerate() {
            self.path.push(Field::Index(number));
            self.filter(filter);
            let repeats =
                matches!(filter.kind, FilterType::RequestMirror | FilterType::ExtensionRef);
            if !repeats && kinds.iter().take(number).any(|kind| *kind == filter.kind) {
                self.error(format!("the filter {:?} is there twice", filter.kind));
            }
            self.path.pop();
        }
        if kinds.contains(&FilterType::RequestRedirect) && kinds.contains(&FilterType::UrlRewrite) {
            self.error("RequestRedirect and URLRewrite do not go together".to_owned());
        }
        self.path.pop();
    }

    fn filter(&mut self, filter: &HttpFilter) {
        let given = [
            (FilterType::RequestHeaderModifier, filter.request_header_modifier.is_some()),
            (FilterType::ResponseHeaderModifier, filter.response_header_modifier.is_some()),
            (FilterType::RequestRedirect, filter.request_redirect.is_some()),
            (FilterType::UrlRewrite, filter.url_rewrite.is_some()),
            (FilterType::RequestMirror, filter.request_mirror.is_some()),
            (FilterType::Cors, filter.cors.is_some()),
            (FilterType::ExtensionRef, filter.extension_ref.is_some()),
        ];
        for (kind, given) in given {
            if given != (kind == filter.kind) {
                let field = filter_field(kind);
                let what = if given { "must not have" } else { "needs" };
                self.error(format!("a filter of type {:?} {what} the field {field}", filter.kind));
            }
        }
        self.headers("requestHeaderModifier", filter.request_header_modifier.as_ref());
        self.headers("responseHeaderModifier", filter.response_header_modifier.as_ref());
        if let Some(redirect) = &filter.request_redirect {
            self.at("requestRedirect", |lint| {
                let status = redirect.status_code.unwrap_or(302);
                if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                    lint.at("statusCode", |lint| {
                        lint.error(format!("{status} is not 301, 302, 303, 307 or 308"));
                    });
                }
                if let Some(scheme) = &redirect.scheme
                    && !matches!(scheme.as_str(), "http" | "https")
                {
                    lint.at("scheme", |lint| {
                        lint.error(format!("{scheme:?} is not http or https"));
                    });
                }
                lint.path_modifier(redirect.path.as_ref());
            });
        }
        if let Some(rewrite) = &filter.url_rewrite {
            self.at("urlRewrite", |lint| {
                lint.path_modifier(rewrite.path.as_ref());
            });
        }
        if let Some(mirror) = &filter.request_mirror {
            self.at("requestMirror", |lint| lint.mirror(mirror));
        }
        if let Some(cors) = &filter.cors {
            self.at("cors", |lint| lint.cors(cors));
        }
    }

    fn mirror(&mut self, mirror: &MirrorFilter) {
        if let Some(percent) = mirror.percent.filter(|percent| *percent > 100) {
            self.at("percent", |lint| lint.error(format!("{percent} is more than 100")));
        }
        let Some(Fraction { numerator, denominator }) = mirror.fraction else {
            return;
        };
        self.at("fraction", |lint| {
            if mirror.percent.is_some() {
                lint.error("percent and fraction do not go together".to_owned());
            } else if denominator == 0 || numerator > denominator {
                lint.error(format!("{numerator}/{denominator} is not a share"));
            }
        });
    }

    fn cors(&mut self, cors: &CorsFilter) {
        self.each("allowOrigins", &cors.allow_origins, |lint, origin| {
            let well_formed = origin == "*"
                || origin.split_once("://").is_some_and(|(scheme, host)| {
                    let rest = host.strip_prefix('*').unwrap_or(host);
                    let plain = |c: char| c.is_ascii_alphanumeric() || "-.:[]".contains(c);
                    scheme.bytes().all(|b| b.is_ascii_alphanumeric())
                        && !scheme.is_empty()
                        && !host.is_empty()
                        && rest.chars().all(plain)
                });
            if !well_formed {
                lint.error(format!("{origin:?} is neither \"*\" nor scheme://host[:port]"));
            }
        });
        let names = [
            ("allowMethods", &cors.allow_methods),
            ("allowHeaders", &cors.allow_headers),
            ("exposeHeaders", &cors.expose_headers),
        ];
        for (field, names) in names {
            self.each(field, names, |lint, name| lint.header_name(name));
        }
    }

    fn headers(&mut self, field: &'static str, modifier: Option<&HeaderModifier>) {
        let Some(modifier) = modifier else { return };
        self.path.push(Field::Name(field));
        for (field, headers) in [("set", &modifier.set), ("add", &modifier.add)] {
            self.each(field, headers, |lint, header| {
                lint.at("name", |lint| lint.header_name(&header.name));
                if header.value.bytes().any(|b| b < 0x20 && b != b'\t' || b == 0x7f) {
                    lint.at("value", |lint| lint.error("control characters".to_owned()));
                }
            });
        }
        self.each("remove", &modifier.remove, |lint, name| {
            lint.header_name(name);
        });
        self.path.pop();
    }

    /// A token (RFC 9110 5.6.2).
    pub(super) fn header_name(&mut self, name: &str) {
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if name.is_empty() || !name.bytes().all(token) {
            self.error(format!("{name:?} is not a header's name"));
        }
    }

    fn path_modifier(&mut self, modifier: Option<&PathModifier>) {
        let Some(modifier) = modifier else { return };
        let full = modifier.kind == PathModifierType::ReplaceFullPath;
        let (field, wanted, other) = match full {
            true => {
                ("replaceFullPath", &modifier.replace_full_path, &modifier.replace_prefix_match)
            }
            false => {
                ("replacePrefixMatch", &modifier.replace_prefix_match, &modifier.replace_full_path)
            }
        };
        if wanted.is_none() || other.is_some() {
            self.at("path", |lint| {
                lint.error(format!("type {:?} has the field {field} and no other", modifier.kind));
            });
        }
    }

    /// A prefix can be replaced only where every match of the rule is one.
    pub(super) fn rewrites_what_matched(&mut self, rule: &HttpRule) {
        let replaces_prefix = |modifier: Option<&PathModifier>| {
            modifier.is_some_and(|m| m.kind == PathModifierType::ReplacePrefixMatch)
        };
        let replaces = rule.filters.iter().any(|filter| {
            replaces_prefix(filter.request_redirect.as_ref().and_then(|f| f.path.as_ref()))
                || replaces_prefix(filter.url_rewrite.as_ref().and_then(|f| f.path.as_ref()))
        });
        let prefixes = rule.matches.iter().all(|found| {
            found.path.as_ref().is_none_or(|path| path.kind == PathMatchType::PathPrefix)
        });
        if replaces && !prefixes {
            self.at("filters", |lint| {
                let text = "ReplacePrefixMatch needs a PathPrefix in every match of the rule";
                lint.error(text.to_owned());
            });
        }
    }

    /// What belongs to a rule as a whole.
    pub(super) fn no_route_filters(&mut self, filters: &[HttpFilter]) {
        let whole = |filter: &&HttpFilter| {
            matches!(
                filter.kind,
                FilterType::RequestRedirect | FilterType::Cors | FilterType::ExtensionRef
            )
        };
        if let Some(filter) = filters.iter().find(whole) {
            let text = format!("a backend cannot have a filter of type {:?}", filter.kind);
            self.at("filters", |lint| lint.error(text));
        }
    }

    pub(super) fn headers_only(&mut self, filters: &[HttpFilter], why: &str) {
        let other = |filter: &HttpFilter| {
            matches!(
                filter.kind,
                FilterType::RequestRedirect | FilterType::UrlRewrite | FilterType::Cors
            )
        };
        if filters.iter().any(other) {
            self.at("filters", |lint| lint.error(why.to_owned()));
        }
    }
}

fn filter_field(kind: FilterType) -> &'static str {
    match kind {
        FilterType::RequestHeaderModifier => "requestHeaderModifier",
        FilterType::ResponseHeaderModifier => "responseHeaderModifier",
        FilterType::RequestRedirect => "requestRedirect",
        FilterType::UrlRewrite => "urlRewrite",
        FilterType::RequestMirror => "requestMirror",
        FilterType::Cors => "cors",
        FilterType::ExtensionRef => "extensionRef",
    }
}
