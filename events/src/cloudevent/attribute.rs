//! The rules for names and values of context attributes.

use super::EnvelopeError;

/// Longest attribute name that is accepted; the specification says that names SHOULD stay within 20.
const MAX_NAME_LENGTH: usize = 64;

/// Most attributes of a published event. A bus adds some of its own, and other buses carry them as headers, of which a
/// message has room for some thousand.
const MAX_COUNT: usize = 256;

/// Names that are not attributes of the open set: required ones, and members of the JSON format.
pub(super) const RESERVED: [&str; 6] =
    ["id", "source", "type", "specversion", "data", "data_base64"];

/// Optional attributes that are strings, or what is written as one.
pub(super) const STRINGS: [&str; 4] = ["time", "subject", "dataschema", "datacontenttype"];

/// Checks how many attributes an event brings.
pub(super) fn check_count(count: usize) -> Result<(), EnvelopeError> {
    if count <= MAX_COUNT {
        return Ok(());
    }
    let reason = format!("has {count} attributes; an event has {MAX_COUNT} at most");
    Err(EnvelopeError::Body { reason })
}

/// Checks the name of an optional or extension attribute.
pub(super) fn check_name(name: &str) -> Result<(), EnvelopeError> {
    if RESERVED.contains(&name) {
        return Err(EnvelopeError::invalid(name, "is a reserved name"));
    }
    let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if name.is_empty() || !name.bytes().all(fine) {
        let reason = "attribute names consist of the letters a to z and digits";
        return Err(EnvelopeError::invalid(name, reason));
    }
    if name.len() > MAX_NAME_LENGTH {
        return Err(EnvelopeError::invalid(name, "the name is longer than 64 characters"));
    }
    Ok(())
}

/// Checks the value of any attribute by what the specification says of its name.
pub(super) fn check(name: &str, value: &str) -> Result<(), EnvelopeError> {
    let error = |reason: &str| Err(EnvelopeError::invalid(name, reason));
    // Nearly all values are plain ASCII, which takes no look at characters.
    let plain = value.bytes().all(|b| matches!(b, b' '..=b'~'));
    if !plain && value.chars().any(is_forbidden) {
        return error("contains control characters");
    }
    match name {
        "id" | "type" | "subject" if value.is_empty() => error("is empty"),
        "source" if value.is_empty() => error("is empty"),
        "source" if !is_uri_reference(value) => error("is not a URI reference"),
        "dataschema" if !is_absolute_uri(value) => error("is not an absolute URI"),
        "datacontenttype" if !is_media_type(value) => error("is not a media type"),
        "time" if !is_rfc3339(value) => {
            error("is not an RFC 3339 time such as 2026-01-31T12:00:00Z")
        }
        _ => Ok(()),
    }
}

/// Only version 1.0 is spoken.
pub(super) fn check_spec_version(value: &str) -> Result<(), EnvelopeError> {
    match value {
        "1.0" => Ok(()),
        "" => Err(EnvelopeError::Missing { attribute: "specversion" }),
        _ => Err(EnvelopeError::invalid("specversion", "only 1.0 is supported")),
    }
}

/// Characters that a `CloudEvents` String must not contain: controls and noncharacters.
fn is_forbidden(c: char) -> bool {
    let code = u32::from(c);
    c.is_control() || (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE
}

/// Any text as a valid attribute value: what must not be in it is replaced.
pub(crate) fn clean_text(text: &str) -> String {
    text.chars().map(|c| if is_forbidden(c) { '\u{fffd}' } else { c }).collect()
}

/// A check of characters and escapes, not of the grammar: sources in the wild are names, paths and URIs.
fn is_uri_reference(value: &str) -> bool {
    let bytes = value.as_bytes();
    let escapes_hold = bytes.iter().enumerate().filter(|(_, b)| **b == b'%').all(|(at, _)| {
        let digits = bytes.get(at + 1..at + 3);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    let fine = |b: &u8| {
        b.is_ascii_graphic()
            && !matches!(b, b'<' | b'>' | b'"' | b'{' | b'}' | b'|' | b'\\' | b'^' | b'`')
    };
    escapes_hold && bytes.iter().all(fine)
}

fn is_absolute_uri(value: &str) -> bool {
    let Some((scheme, _rest)) = value.split_once(':') else {
        return false;
    };
    let letters = |b: u8| b.is_ascii_alphanumeric() || b"+-.".contains(&b);
    scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(letters)
        && is_uri_reference(value)
}

/// `type/subtype`, both tokens, then anything printable: parameters are the app's own business.
fn is_media_type(value: &str) -> bool {
    let essence = value.split(';').next().unwrap_or_default().trim_end();
    let token = |part: &str| {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        !part.is_empty() && part.bytes().all(fine)
    };
    let printable = value.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    printable && essence.split_once('/').is_some_and(|(kind, sub)| token(kind) && token(sub))
}

/// The shape that RFC 3339 asks for, then a real calendar. The parser alone would take more shapes.
fn is_rfc3339(value: &str) -> bool {
    let bytes = value.as_bytes();
    let shape = "dddd-dd-ddTdd:dd:dd";
    let Some(head) = bytes.get(..shape.len()) else {
        return false;
    };
    let head_fits = head.iter().zip(shape.bytes()).all(|(b, s)| match s {
        b'd' => b.is_ascii_digit(),
        b'T' => matches!(b, b'T' | b't'),
        mark => *b == mark,
    });
    let tail_fits =
        bytes.iter().skip(shape.len()).all(|b| b".:+-Zz".contains(b) || b.is_ascii_digit());
    let offset_is_named = value.ends_with(['Z', 'z']) || bytes.get(bytes.len() - 3) == Some(&b':');
    head_fits && tail_fits && offset_is_named && super::schedule::time(value).is_some()
}
