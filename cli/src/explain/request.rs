//! A request as a sidecar gets it, from a command line in the manner of curl's.

use anyhow::{Context as _, bail};
use http::header::{HOST, HeaderName, HeaderValue};
use http::{Method, Request, Uri, request};

/// The head of the request. With a `Host` header the URL only says where the sidecar listens, as in
/// `curl -H 'Host: inventory' http://127.0.0.1:15001/stock`.
pub(crate) fn head(method: &str, url: &str, headers: &[String]) -> anyhow::Result<request::Parts> {
    let method: Method = method.parse().with_context(|| format!("{method:?} is not a method"))?;
    if method == Method::CONNECT {
        bail!("CONNECT is for destinations outside the mesh, which a sidecar does not dial");
    }
    let mut request = Request::builder().method(method).uri(uri(url)?);
    for header in headers {
        let (name, value) = pair(header)?;
        request = request.header(name, value);
    }
    let (mut head, ()) = request.body(())?.into_parts();
    if head.headers.contains_key(HOST) {
        let target = head.uri.path_and_query().cloned();
        head.uri = target.map(Uri::from).unwrap_or_default();
    }
    Ok(head)
}

fn uri(url: &str) -> anyhow::Result<Uri> {
    let whole = match url.split_once("://") {
        None => format!("http://{url}"),
        Some(("http", _)) => url.to_owned(),
        Some((scheme, _)) => bail!(
            "a sidecar carries http:// only, and encrypts it: {scheme}:// is between the application and its peer"
        ),
    };
    whole.parse().with_context(|| format!("{url:?} is not a URL"))
}

fn pair(header: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let (name, value) = header
        .split_once(':')
        .with_context(|| format!("a header is written as `name: value`, not {header:?}"))?;
    let name = name.trim().parse().with_context(|| format!("{name:?} is not a header's name"))?;
    let value = value.trim();
    let value = value.parse().with_context(|| format!("{value:?} is not a header's value"))?;
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri_of(url: &str, headers: &[&str]) -> String {
        let headers: Vec<String> = headers.iter().map(|&header| header.to_owned()).collect();
        head("GET", url, &headers).unwrap().uri.to_string()
    }

    #[test]
    fn a_request_is_written_as_for_curl() {
        assert_eq!(uri_of("http://inventory/stock?x=1", &[]), "http://inventory/stock?x=1");
        assert_eq!(uri_of("inventory:8080", &[]), "http://inventory:8080/");
        let through = uri_of("http://127.0.0.1:15001/stock", &["Host: inventory"]);
        assert_eq!(through, "/stock", "the header says for whom it is");
        let headers = ["x-a: 1".to_owned(), "X-A:2".to_owned()];
        let head = head("POST", "http://a/", &headers).unwrap();
        assert_eq!(head.method, "POST");
        assert_eq!(head.headers.get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
    }

    #[test]
    fn what_is_no_request_is_named() {
        let why = |method: &str, url: &str, header: &str| {
            format!("{:#}", head(method, url, &[header.to_owned()]).unwrap_err())
        };
        assert!(why("GET", "https://a", "a: b").contains("http:// only"));
        assert!(why("GET", "http://a b", "a: b").contains("not a URL"));
        assert!(why("G T", "http://a", "a: b").contains("not a method"));
        assert!(why("CONNECT", "http://a", "a: b").contains("CONNECT"));
        assert!(why("GET", "http://a", "a").contains("`name: value`"));
        assert!(why("GET", "http://a", "a b: c").contains("header's name"));
    }
}
