//! Names that NATS takes, for any name that Duet takes. Pure.

use xxhash_rust::xxh3::xxh3_128;

/// Longest readable part of a token; longer names end in a hash. A server takes names of up to 255 bytes.
const MAX_READABLE: usize = 150;

/// A name as one token of a subject, and as part of the name of a stream, a consumer or a key: letters, digits and `-`
/// stay, every other byte is `_` and two hexadecimal digits. Different names have different tokens.
pub(super) fn token(name: &str) -> String {
    let mut token = String::with_capacity(name.len() + 8);
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            token.push(char::from(byte));
        } else {
            token.push_str(&format!("_{byte:02X}"));
        }
    }
    if token.len() > MAX_READABLE {
        token.truncate(MAX_READABLE);
        // No escape starts with a small letter.
        token.push_str(&format!("_h{:032x}", xxh3_128(name.as_bytes())));
    }
    token
}

/// The identity by which JetStream knows a repeated publish.
pub(super) fn message_id(source: &str, id: &str) -> String {
    let mut text = Vec::with_capacity(source.len() + id.len() + 1);
    text.extend_from_slice(source.as_bytes());
    text.push(0);
    text.extend_from_slice(id.as_bytes());
    format!("{:032x}", xxh3_128(&text))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tokens_are_readable_and_safe() {
        for (name, expected) in [
            ("orders", "orders"),
            ("orders.placed", "orders_2Eplaced"),
            ("a_b", "a_5Fb"),
            ("shop/fulfil", "shop_2Ffulfil"),
            ("a*>", "a_2A_3E"),
            ("ö", "_C3_B6"),
        ] {
            assert_eq!(token(name), expected);
        }
        let (one, two) = (format!("{}1", "x".repeat(254)), format!("{}2", "x".repeat(254)));
        assert_ne!(token(&one), token(&two));
    }

    #[test]
    fn a_separator_keeps_identities_apart() {
        assert_ne!(message_id("/a", "bc"), message_id("/ab", "c"));
    }

    proptest! {
        #[test]
        fn a_token_fits_a_server(name in ".{1,255}") {
            let token = token(&name);
            prop_assert!(token.len() <= 190);
            prop_assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
        }
    }
}
