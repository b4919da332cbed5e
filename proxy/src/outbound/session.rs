//! Keeps a client at the endpoint that it got first, by a cookie or a header that it brings back (GEP-1619).

use std::time::{Duration, SystemTime};

use duet_api::proto;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, request};

use super::destination::duration;
use crate::http::cookie;

/// How a rule does it.
#[derive(Debug)]
pub struct Session {
    carrier: Carrier,
    absolute_timeout: Option<Duration>,
    permanent: bool,
}

#[derive(Debug)]
enum Carrier {
    Cookie(String),
    Header(HeaderName),
}

/// What a client brought back: the endpoint's token, and when the session began, seconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// See [`super::replica::Replica::token`].
    pub endpoint: u64,
    began: u64,
}

impl Session {
    /// Checks and compiles.
    ///
    /// # Errors
    /// When the name cannot be one of a cookie or header.
    pub fn compile(raw: &proto::SessionPersistence) -> Result<Self, String> {
        let error = || format!("{:?} is not a session's name", raw.name);
        // A cookie's name is a token, as a header's is (RFC 6265 section 4.1.1).
        let name: HeaderName = raw.name.parse().map_err(|_err| error())?;
        let carrier =
            if raw.header { Carrier::Header(name) } else { Carrier::Cookie(raw.name.clone()) };
        let absolute_timeout = duration(raw.absolute_timeout).filter(|timeout| !timeout.is_zero());
        Ok(Self { carrier, absolute_timeout, permanent: raw.permanent })
    }

    /// What the client brought back, unless its time is over or it makes no sense.
    #[must_use]
    pub fn read(&self, head: &request::Parts) -> Option<Token> {
        let text = match &self.carrier {
            Carrier::Cookie(name) => cookie::find(&head.headers, name)?,
            Carrier::Header(name) => head.headers.get(name)?.to_str().ok()?,
        };
        let (endpoint, began) = text.split_once('.')?;
        let token = Token {
            endpoint: u64::from_str_radix(endpoint, 16).ok()?,
            began: u64::from_str_radix(began, 16).ok()?,
        };
        let age = now().checked_sub(token.began)?;
        let over = self.absolute_timeout.is_some_and(|timeout| age >= timeout.as_secs().max(1));
        (!over).then_some(token)
    }

    /// Gives the client what to bring back, where it does not have that already.
    pub fn write(&self, brought: Option<Token>, endpoint: u64, headers: &mut HeaderMap) {
        if brought.is_some_and(|token| token.endpoint == endpoint) {
            return;
        }
        let value = format!("{endpoint:016x}.{:x}", now());
        match &self.carrier {
            Carrier::Header(name) => {
                if let Ok(value) = HeaderValue::from_str(&value) {
                    headers.insert(name, value);
                }
            }
            Carrier::Cookie(name) => {
                let mut text = format!("{name}={value}; Path=/; HttpOnly; SameSite=Lax");
                if let Some(timeout) = self.absolute_timeout.filter(|_| self.permanent) {
                    text.push_str(&format!("; Max-Age={}", timeout.as_secs().max(1)));
                }
                if let Ok(value) = HeaderValue::from_str(&text) {
                    headers.append(header::SET_COOKIE, value);
                }
            }
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn session(header: bool, timeout: Option<i64>) -> Session {
        let absolute_timeout = timeout.map(|seconds| prost_types::Duration { seconds, nanos: 0 });
        let raw = proto::SessionPersistence {
            name: "s".to_owned(),
            header,
            absolute_timeout,
            permanent: true,
        };
        Session::compile(&raw).unwrap()
    }

    fn asked(name: &str, value: &str) -> request::Parts {
        Request::get("/").header(name, value).body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_is_given_is_understood_when_it_comes_back() {
        for header in [false, true] {
            let session = session(header, Some(60));
            let mut headers = HeaderMap::new();
            session.write(None, 0xabc, &mut headers);
            let name = if header { "s" } else { "set-cookie" };
            let text = headers[name].to_str().unwrap().to_owned();
            let back = if header {
                asked("s", &text)
            } else {
                assert!(text.ends_with("; Max-Age=60"), "{text}");
                asked("cookie", &format!("x=1; {}", text.split(';').next().unwrap()))
            };
            let token = session.read(&back).unwrap();
            assert_eq!(token.endpoint, 0xabc);
            let mut headers = HeaderMap::new();
            session.write(Some(token), 0xabc, &mut headers);
            assert!(headers.is_empty());
        }
    }

    #[test]
    fn old_and_made_up_sessions_do_not_count() {
        let old = format!("1.{:x}", now() - 100);
        assert!(session(true, Some(60)).read(&asked("s", &old)).is_none());
        assert!(session(true, None).read(&asked("s", &old)).is_some());
        let future = format!("1.{:x}", now() + 100);
        for made_up in ["", ".", "x.1", "1", "1.", future.as_str(), "1.ffffffffffffffffff"] {
            assert!(session(true, None).read(&asked("s", made_up)).is_none(), "{made_up}");
        }
    }
}
