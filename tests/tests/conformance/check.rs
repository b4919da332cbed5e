//! What a case expects, against what came of a request.

use std::collections::BTreeMap;
use std::time::Duration;

use http::{HeaderMap, Uri, header};

use super::case::{Expect, Mirror, Redirect};
use super::client::{Ask, Reply};
use super::echo::{ANSWERED, Arrival, Log};

/// A copy to a mirror has at most this long to arrive after the answer.
pub(crate) const MIRRORED: Duration = Duration::from_secs(3);

/// What came of one request.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) reply: Reply,
    /// At whatever pods, in the order in which they came.
    pub(crate) arrivals: Vec<Arrival>,
}

type Verdict = Result<(), String>;

impl Outcome {
    /// The request as the pod saw it that answered; none where the mesh did.
    pub(crate) fn answered(&self) -> Option<&Arrival> {
        let number = self.reply.headers.get(ANSWERED)?.to_str().ok()?;
        self.arrivals.get(number.parse::<usize>().ok()?)
    }

    /// Everything but what is said of many requests together, and of copies, which may come later.
    pub(crate) fn check(&self, expect: &Expect, ask: &Ask) -> Verdict {
        self.status(expect)?;
        self.backend(expect)?;
        self.seen(expect, ask)?;
        self.response(expect)?;
        if let Some(redirect) = &expect.redirect {
            self.redirect(redirect, ask)?;
        }
        if expect.websocket_replies.is_empty() {
            return Ok(());
        }
        equal("WebSocket replies", &self.reply.messages, &expect.replies())
    }

    fn status(&self, expect: &Expect) -> Verdict {
        let (status, fine) = (self.reply.status, &expect.status);
        if !fine.is_empty() && !fine.contains(&status) && !expect.status_lenient.contains(&status) {
            return Err(format!("status {} instead of {fine:?}", self.reply.describe()));
        }
        match expect.grpc_status {
            Some(expected) if self.reply.grpc_status() != expected => {
                let (status, reply) = (self.reply.grpc_status(), self.reply.describe());
                Err(format!("gRPC status {status} instead of {expected}; HTTP status {reply}"))
            }
            _ => Ok(()),
        }
    }

    fn backend(&self, expect: &Expect) -> Verdict {
        if let Some(bypass) = self.arrivals.iter().find(|arrival| arrival.at.sentinel) {
            return Err(format!("no route was used: the request came to {}", bypass.at.pod));
        }
        match (expect.reaches_backend, self.arrivals.first()) {
            (Some(true), None) => {
                return Err(format!("no backend was reached: {}", self.reply.describe()));
            }
            (Some(false), Some(arrival)) => {
                return Err(format!("the request came to {}, but must not", arrival.at.pod));
            }
            _ => {}
        }
        if let Some(backend) = &expect.backend {
            equal("backend", &self.answerer()?.at.deployment, backend)?;
            let fits = |arrival: &&Arrival| {
                arrival.at.deployment == *backend
                    || expect.mirrored_to.iter().any(|m| m.is(arrival))
            };
            if let Some(stray) = self.arrivals.iter().find(|arrival| !fits(arrival)) {
                return Err(format!("the request also came to {}", stray.at.pod));
            }
        }
        match &expect.namespace {
            Some(namespace) => equal("namespace", &self.answerer()?.at.namespace, namespace),
            None => Ok(()),
        }
    }

    fn answerer(&self) -> Result<&Arrival, String> {
        let text = || format!("no backend answered, but the mesh: {}", self.reply.describe());
        self.answered().ok_or_else(text)
    }

    fn seen(&self, expect: &Expect, ask: &Ask) -> Verdict {
        if let Some(method) = &expect.method_seen {
            equal("method seen", &self.answerer()?.method, method)?;
        }
        if let Some(path) = &expect.path_seen {
            equal("path seen", &self.answerer()?.path, &ask.told_apart(path, expect))?;
        }
        if let Some(host) = &expect.host_seen {
            equal("host seen", &self.answerer()?.host, host)?;
        }
        let (headers, absent) = (&expect.request_headers_seen, &expect.absent_request_headers);
        if headers.is_empty() && absent.is_empty() {
            return Ok(());
        }
        let seen = &self.answerer()?.headers;
        has_headers("request header seen", seen, headers, |value| value.to_owned())?;
        lacks_headers("request header seen", seen, absent)
    }

    fn response(&self, expect: &Expect) -> Verdict {
        let headers = &self.reply.headers;
        let normal = |value: &str| match expect.ignore_header_whitespace {
            true => value.replace(' ', ""),
            false => value.to_owned(),
        };
        has_headers("response header", headers, &expect.response_headers, normal)?;
        for (name, values) in &expect.response_headers_any_of {
            let value = joined(headers, name);
            if !values.iter().any(|fine| value.as_deref().map(normal) == Some(normal(fine))) {
                return Err(format!("response header {name}: {value:?} is none of {values:?}"));
            }
        }
        lacks_headers("response header", headers, &expect.absent_response_headers)
    }

    fn redirect(&self, expected: &Redirect, ask: &Ask) -> Verdict {
        let location = joined(&self.reply.headers, header::LOCATION.as_str());
        let location = location.ok_or("no Location")?;
        // A reference without a scheme and host is relative to what was asked.
        let absolute = match location.starts_with('/') {
            true => format!("http://{}{location}", ask.host),
            false => location.clone(),
        };
        let uri: Uri = absolute.parse().map_err(|error| format!("{location:?}: {error}"))?;
        let part = |name: &str, found: &str, expected: &str| {
            equal(&format!("Location {location}: {name}"), &found, &expected)
        };
        part("scheme", uri.scheme_str().unwrap_or_default(), &expected.scheme)?;
        if let Some(host) = &expected.host {
            part("host", uri.host().unwrap_or_default(), host)?;
        }
        let port = uri.port().map(|port| port.to_string()).unwrap_or_default();
        if !expected.port_any_of.contains(&port) {
            let fine = &expected.port_any_of;
            return Err(format!("Location {location}: port {port:?} is none of {fine:?}"));
        }
        part("path", uri.path(), &expected.path)
    }
}

impl Ask {
    /// A path that the case gives, as it is for this very request: with its id, where copies are to be told apart.
    pub(crate) fn told_apart(&self, path: &str, expect: &Expect) -> String {
        let path = path.replace("{fresh-uuid}", &self.id);
        if expect.mirrored_to.is_empty() {
            return path;
        }
        let separator = if path.contains('?') { '&' } else { '?' };
        format!("{path}{separator}gateway-api-conformance-request-id={}", self.id)
    }
}

/// Waits until every mirror has got its copy.
pub(crate) async fn mirrored(log: &Log, ask: &Ask, expect: &Expect) -> Verdict {
    let path = expect.path_seen.as_ref().map(|path| ask.told_apart(path, expect));
    let missing = || {
        let arrivals = log.arrivals(&ask.id);
        expect.mirrored_to.iter().find(|mirror| {
            !arrivals.iter().any(|arrival| {
                mirror.is(arrival) && path.as_ref().is_none_or(|path| *path == arrival.path)
            })
        })
    };
    let arrived = async {
        while missing().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(MIRRORED, arrived).await.is_err()
        && let Some(mirror) = missing()
    {
        return Err(format!("no copy with the path seen came to {}", mirror.backend));
    }
    Ok(())
}

impl Mirror {
    pub(crate) fn is(&self, arrival: &Arrival) -> bool {
        self.backend == arrival.at.deployment && self.namespace == arrival.at.namespace
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, expected: &T) -> Verdict {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: {found:?} instead of {expected:?}"))
}

/// A header's values, joined.
fn joined(headers: &HeaderMap, name: &str) -> Option<String> {
    let values = headers.get_all(name).iter();
    let values: Vec<_> = values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
    (!values.is_empty()).then(|| values.join(","))
}

fn has_headers(
    what: &str,
    found: &HeaderMap,
    expected: &BTreeMap<String, String>,
    normal: impl Fn(&str) -> String,
) -> Verdict {
    for (name, value) in expected {
        let found = joined(found, name).map(|found| normal(&found));
        equal(&format!("{what} {name}"), &found, &Some(normal(value)))?;
    }
    Ok(())
}

fn lacks_headers(what: &str, found: &HeaderMap, absent: &[String]) -> Verdict {
    match absent.iter().find(|name| found.contains_key(name.as_str())) {
        Some(name) => Err(format!("{what} {name} is there: {:?}", joined(found, name))),
        None => Ok(()),
    }
}
