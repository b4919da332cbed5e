//! `/v1.0/invoke/{app}/method/{path}` and the `dapr-app-id` header: a call into the mesh, by name.

use http::header::{self, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, StatusCode, Uri};

use super::problem::Problem;

/// `rest` is what follows `/v1.0/invoke/`.
///
/// # Errors
/// When it names no app, or no path that can be.
pub(super) fn by_path<B>(rest: &str, request: &mut Request<B>) -> Result<(), Problem> {
    let Some((app, path)) = rest.split_once("/method") else {
        return Err(bad("the path is /v1.0/invoke/{app}/method/{path}".to_owned()));
    };
    if !(path.is_empty() || path.starts_with('/')) {
        return Err(bad("the path is /v1.0/invoke/{app}/method/{path}".to_owned()));
    }
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let path = if path.is_empty() { "/" } else { path };
    let target = PathAndQuery::try_from(format!("{path}{query}"))
        .map_err(|error| bad(format!("{path:?}: {error}")))?;
    aim(request, app, target)
}

/// The path stays; the header names the service.
///
/// # Errors
/// When it names none.
pub(super) fn by_header<B>(name: &HeaderName, request: &mut Request<B>) -> Result<(), Problem> {
    let app = request.headers_mut().remove(name);
    let app = app.as_ref().and_then(|app| app.to_str().ok()).unwrap_or_default().to_owned();
    let target = crate::http::headers::path_and_query(request.uri());
    aim(request, &app, target)
}

/// Names the service that a request is for.
///
/// # Errors
/// When `app` cannot be the name of one.
pub(super) fn aim<B>(
    request: &mut Request<B>,
    app: &str,
    target: PathAndQuery,
) -> Result<(), Problem> {
    let authority = app.parse::<Authority>().ok().filter(|name| !name.as_str().contains('@'));
    let authority = authority.ok_or_else(|| bad(format!("{app:?} is not the name of an app")))?;
    let host = HeaderValue::from_str(authority.as_str())
        .map_err(|error| bad(format!("{app:?}: {error}")))?;
    let uri = Uri::builder().scheme(Scheme::HTTP).authority(authority).path_and_query(target);
    *request.uri_mut() = uri.build().map_err(|error| bad(error.to_string()))?;
    request.headers_mut().insert(header::HOST, host);
    Ok(())
}

fn bad(text: String) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "ERR_DIRECT_INVOKE", text)
}
