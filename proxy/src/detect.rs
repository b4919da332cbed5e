//! What a client speaks, by its first bytes.

use std::time::Duration;

use tokio::net::TcpStream;

/// What was detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A TLS handshake.
    Tls,
    /// HTTP/1.
    Http1,
    /// The HTTP/2 preface (RFC 9113 section 3.4).
    Http2,
    /// Something else.
    Opaque,
}

/// Why nothing was detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotDetected {
    /// The client said nothing in time.
    Silent,
    /// The client left.
    Closed,
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Classifies the first bytes; `None` when more are needed.
#[must_use]
pub fn classify(bytes: &[u8]) -> Option<Protocol> {
    match bytes {
        [] => None,
        // A handshake record of some TLS version: type 22, version 3.x.
        [22, 3, ..] => Some(Protocol::Tls),
        [22] => None,
        _ if PREFACE.starts_with(bytes) => {
            (bytes.len() >= PREFACE.len()).then_some(Protocol::Http2)
        }
        _ if bytes.starts_with(PREFACE) => Some(Protocol::Http2),
        // A method is a token (RFC 9110 section 5.6.2), then a space. The longest that anybody uses is 16 long.
        _ => match bytes.iter().position(|byte| !is_token(*byte)) {
            Some(0) => Some(Protocol::Opaque),
            Some(end) if bytes.get(end) == Some(&b' ') => Some(Protocol::Http1),
            Some(_) => Some(Protocol::Opaque),
            None if bytes.len() > 32 => Some(Protocol::Opaque),
            None => None,
        },
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Looks at the first bytes without taking them.
///
/// # Errors
/// When the client is silent for `timeout`, or leaves.
pub async fn detect(stream: &TcpStream, timeout: Duration) -> Result<Protocol, NotDetected> {
    let look = async {
        let mut buffer = [0; 64];
        let mut seen = 0;
        loop {
            let length = stream.peek(&mut buffer).await.map_err(|_err| NotDetected::Closed)?;
            if length == 0 {
                return Err(NotDetected::Closed);
            }
            let bytes = buffer.get(..length).unwrap_or_default();
            if let Some(protocol) = classify(bytes) {
                return Ok(protocol);
            }
            if length == seen {
                // Peeking is ready as long as bytes lie there: wait a little for more of them.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            seen = length;
        }
    };
    tokio::time::timeout(timeout, look).await.unwrap_or(Err(NotDetected::Silent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_told_apart() {
        assert_eq!(classify(b"GET / HTTP/1.1\r\n"), Some(Protocol::Http1));
        assert_eq!(classify(b"M-SEARCH *"), Some(Protocol::Http1));
        assert_eq!(classify(PREFACE), Some(Protocol::Http2));
        assert_eq!(classify(&[22, 3, 1, 0]), Some(Protocol::Tls));
        assert_eq!(classify(b"\x00\x01"), Some(Protocol::Opaque));
        assert_eq!(classify(b"SSH-2.0-x\r\n"), Some(Protocol::Opaque));
        for partial in [&b""[..], b"PRI", b"PR", b"GE", &[22], &PREFACE[..20]] {
            assert_eq!(classify(partial), None, "{partial:?}");
        }
        assert_eq!(classify(b"PRI /x HTTP/1.1"), Some(Protocol::Http1));
    }
}
