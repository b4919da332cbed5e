//! The time that is left for a request, as it travels: `grpc-timeout` (gRPC over HTTP/2) and `duet-timeout-ms`.

use std::time::Duration;

use http::HeaderMap;
use http::header::HeaderValue;

use super::headers::{GRPC_TIMEOUT, TIMEOUT_MS, has_ours};

/// What the caller left; for a gRPC call the shorter of both headers. What makes no sense counts as absent.
#[must_use]
pub fn read(headers: &HeaderMap, grpc: bool) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let plain = has_ours(headers).then(|| text(TIMEOUT_MS)?.parse().ok()).flatten();
    let grpc = grpc.then(|| grpc_timeout(text(GRPC_TIMEOUT)?)).flatten();
    let plain = plain.map(Duration::from_millis);
    plain.into_iter().chain(grpc).min()
}

/// Up to eight digits and a unit.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.is_empty() || number.len() > 8 || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Says what is left, in the words of the protocol.
pub fn write(headers: &mut HeaderMap, left: Duration, grpc: bool) {
    if grpc {
        let micros = left.as_micros();
        let text = match micros {
            0..=99_999_999 => format!("{micros}u"),
            _ => format!("{}m", left.as_millis().min(99_999_999)),
        };
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(GRPC_TIMEOUT, value);
        }
    } else {
        let millis = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        headers.insert(TIMEOUT_MS, HeaderValue::from(millis));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &'static str, value: &'static str) -> Option<Duration> {
        let name = http::HeaderName::from_static(name);
        read(&HeaderMap::from_iter([(name, HeaderValue::from_static(value))]), true)
    }

    #[test]
    fn both_forms_are_read_and_nonsense_is_not() {
        assert_eq!(of("grpc-timeout", "100m"), Some(Duration::from_millis(100)));
        assert_eq!(of("grpc-timeout", "99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(of("duet-timeout-ms", "250"), Some(Duration::from_millis(250)));
        for nonsense in ["", "m", "1", "1x", "-1m", "123456789m", "1 m"] {
            assert_eq!(of("grpc-timeout", nonsense), None, "{nonsense}");
        }
        assert_eq!(of("duet-timeout-ms", "soon"), None);
    }

    #[test]
    fn what_is_written_is_read_again() {
        for left in [Duration::from_micros(5), Duration::from_secs(3), Duration::from_secs(4000)] {
            let mut headers = HeaderMap::new();
            write(&mut headers, left, true);
            assert_eq!(read(&headers, true), Some(left));
        }
    }
}
