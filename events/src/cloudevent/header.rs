//! Attribute values in HTTP headers: percent-encoding and quoted strings.

use std::borrow::Cow;

use http::HeaderValue;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode, utf8_percent_encode};

use super::EnvelopeError;

/// What the HTTP binding escapes: space, double quote, percent, and all outside U+0021 to U+007E.
const ESCAPED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// An attribute's value as a header value.
pub(super) fn encode(value: &str) -> HeaderValue {
    let escaped = Cow::<str>::from(utf8_percent_encode(value, ESCAPED));
    // Escaping leaves visible ASCII only, which is always a header value.
    HeaderValue::try_from(escaped.as_ref())
        .unwrap_or_else(|_impossible| HeaderValue::from_static(""))
}

/// A header value as an attribute's value: unquoted if quoted, then one round of percent-decoding.
pub(super) fn decode(name: &str, value: &HeaderValue) -> Result<String, EnvelopeError> {
    let unquoted = unquote(name, value.as_bytes())?;
    let broken = unquoted.iter().enumerate().filter(|(_, b)| **b == b'%').any(|(at, _)| {
        let digits = unquoted.get(at + 1..at + 3);
        !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    if broken {
        return Err(EnvelopeError::invalid(name, "a percent sign starts no valid escape"));
    }
    match percent_decode(&unquoted).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_invalid) => Err(EnvelopeError::invalid(name, "is not valid UTF-8")),
    }
}

/// Undoes an HTTP quoted-string; other values stay as they are.
fn unquote<'a>(name: &str, value: &'a [u8]) -> Result<Cow<'a, [u8]>, EnvelopeError> {
    let [b'"', inner @ ..] = value else {
        return Ok(Cow::Borrowed(value));
    };
    let error = || EnvelopeError::invalid(name, "the quoted value is not closed at its end");
    let mut unquoted = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    loop {
        match bytes.next() {
            Some(b'"') if bytes.as_slice().is_empty() => return Ok(Cow::Owned(unquoted)),
            Some(b'"') | None => return Err(error()),
            Some(b'\\') => unquoted.push(*bytes.next().ok_or_else(error)?),
            Some(other) => unquoted.push(*other),
        }
    }
}
