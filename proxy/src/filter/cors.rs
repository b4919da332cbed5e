//! The CORS protocol (Fetch standard, section 3.3; Gateway API GEP-1767): preflights are answered here, and responses say
//! who may read them.

use duet_api::proto;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Response, StatusCode, request};

use crate::http::body::Body;

/// Which cross-origin requests browsers may make.
#[derive(Debug)]
pub struct Cors {
    origins: Vec<Origin>,
    credentials: bool,
    methods: List,
    headers: List,
    expose: List,
    max_age: HeaderValue,
}

#[derive(Debug)]
enum Origin {
    Any,
    Exact(String),
    /// What stands before and after `*`, which stands for at least one character.
    Wildcard(String, String),
}

/// Names, with `*` known.
#[derive(Debug)]
struct List {
    any: bool,
    /// Joined by `, `; empty where there are none.
    text: HeaderValue,
}

impl List {
    fn compile(names: &[String]) -> Result<Self, String> {
        let text = names.join(", ");
        let value = HeaderValue::from_str(&text).map_err(|_err| format!("{text:?} in CORS"))?;
        Ok(Self { any: names.iter().any(|name| name == "*"), text: value })
    }

    fn is_empty(&self) -> bool {
        self.text.is_empty()
    }
}

/// All of our answers depend on these, so caches must tell them apart.
const VARY: HeaderValue = HeaderValue::from_static("Origin");

impl Cors {
    /// Checks and compiles.
    ///
    /// # Errors
    /// When a name cannot stand in a header.
    pub fn compile(raw: &proto::Cors) -> Result<Self, String> {
        let origin = |text: &String| match text.split_once('*') {
            Some(("", "")) => Origin::Any,
            Some((before, after)) => {
                Origin::Wildcard(before.to_ascii_lowercase(), after.to_ascii_lowercase())
            }
            None => Origin::Exact(text.to_ascii_lowercase()),
        };
        Ok(Self {
            origins: raw.allow_origins.iter().map(origin).collect(),
            credentials: raw.allow_credentials,
            methods: List::compile(&raw.allow_methods)?,
            headers: List::compile(&raw.allow_headers)?,
            expose: List::compile(&raw.expose_headers)?,
            max_age: HeaderValue::from(raw.max_age),
        })
    }

    /// The answer to a preflight; `None`: the request is not one.
    #[must_use]
    pub fn preflight(&self, head: &request::Parts) -> Option<Response<Body>> {
        let asked = &head.headers;
        let method = asked.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
        let origin = asked.get(header::ORIGIN)?;
        if head.method != Method::OPTIONS {
            return None;
        }
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        headers.insert(header::VARY, VARY);
        if !self.allow(origin, headers) {
            return Some(response);
        }
        let methods = if self.methods.any { method } else { &self.methods.text };
        put(headers, header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        // `*` does not count with credentials (Fetch): what was asked for always does.
        let wanted = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
        let allowed = if self.headers.any { wanted } else { Some(&self.headers.text) };
        if let Some(allowed) = allowed {
            put(headers, header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
        }
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, self.max_age.clone());
        Some(response)
    }

    /// What the response to a cross-origin request says besides; `None`: it is none, or not allowed.
    #[must_use]
    pub fn response(&self, head: &request::Parts) -> Option<HeaderMap> {
        let origin = head.headers.get(header::ORIGIN)?;
        let mut headers = HeaderMap::new();
        self.allow(origin, &mut headers).then(|| {
            headers.insert(header::VARY, VARY);
            headers
        })
    }

    fn allow(&self, origin: &HeaderValue, headers: &mut HeaderMap) -> bool {
        let Ok(text) = origin.to_str().map(str::to_ascii_lowercase) else {
            return false;
        };
        let mut any = false;
        let allowed = self.origins.iter().any(|allowed| match allowed {
            Origin::Any => {
                any = true;
                true
            }
            Origin::Exact(exact) => text == *exact,
            Origin::Wildcard(before, after) => {
                let rest = text.strip_prefix(before.as_str());
                let middle = rest.and_then(|rest| rest.strip_suffix(after.as_str()));
                middle.is_some_and(|middle| !middle.is_empty())
            }
        });
        if !allowed {
            return false;
        }
        let value = match any && !self.credentials {
            true => HeaderValue::from_static("*"),
            false => origin.clone(),
        };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, value);
        if self.credentials {
            let yes = HeaderValue::from_static("true");
            headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
        }
        if !self.expose.is_empty() {
            put(headers, header::ACCESS_CONTROL_EXPOSE_HEADERS, &self.expose.text);
        }
        true
    }
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &HeaderValue) {
    if !value.is_empty() {
        headers.insert(name, value.clone());
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn cors(origins: &[&str], credentials: bool) -> Cors {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let raw = proto::Cors {
            allow_origins: list(origins),
            allow_credentials: credentials,
            allow_methods: list(&["GET", "PUT"]),
            allow_headers: list(&["*"]),
            expose_headers: list(&["x-a"]),
            max_age: 60,
        };
        Cors::compile(&raw).unwrap()
    }

    fn asked(method: Method, origin: &str) -> request::Parts {
        let request = Request::builder().method(method).header("origin", origin);
        let request = request.header("access-control-request-method", "PUT");
        let request = request.header("access-control-request-headers", "x-b");
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn origins_match_exactly_or_by_wildcard() {
        let cors = cors(&["https://a.com", "https://*.b.com"], true);
        let allowed = |origin: &str| {
            let headers = cors.response(&asked(Method::GET, origin));
            headers
                .map(|headers| headers["access-control-allow-origin"].to_str().unwrap().to_owned())
        };
        assert_eq!(allowed("https://a.com").as_deref(), Some("https://a.com"));
        assert_eq!(allowed("https://x.y.b.com").as_deref(), Some("https://x.y.b.com"));
        for refused in ["https://b.com", "http://a.com", "https://a.com.evil.org", "null"] {
            assert_eq!(allowed(refused), None, "{refused}");
        }
    }

    #[test]
    fn preflights_are_answered_and_other_requests_are_not() {
        let answer = cors(&["*"], false).preflight(&asked(Method::OPTIONS, "https://q")).unwrap();
        assert_eq!(answer.status(), 204);
        assert_eq!(answer.headers()["access-control-allow-origin"], "*");
        assert_eq!(answer.headers()["access-control-allow-methods"], "GET, PUT");
        assert_eq!(answer.headers()["access-control-allow-headers"], "x-b");
        assert_eq!(answer.headers()["access-control-max-age"], "60");
        assert!(!answer.headers().contains_key("access-control-allow-credentials"));
        let strict = cors(&["https://a"], true);
        let refused = strict.preflight(&asked(Method::OPTIONS, "https://q")).unwrap();
        assert!(!refused.headers().contains_key("access-control-allow-origin"));
        assert!(strict.preflight(&asked(Method::GET, "https://a")).is_none());
    }
}
