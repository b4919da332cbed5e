//! Reading a cookie out of requests (RFC 6265 section 4.2).

use http::{HeaderMap, header};

/// The value of the first cookie of this name.
#[must_use]
pub fn find<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let lines = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.split_once('='));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn cookies_are_found_in_one_line_or_several() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, HeaderValue::from_static("a=1; b=2=3"));
        headers.append(header::COOKIE, HeaderValue::from_static("c=4"));
        assert_eq!(find(&headers, "b"), Some("2=3"));
        assert_eq!(find(&headers, "c"), Some("4"));
        assert_eq!(find(&headers, "d"), None);
    }
}
