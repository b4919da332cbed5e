//! Paths that only an application's own sidecar asks for: Dapr's callbacks. A peer that could ask for them would learn
//! the application's subscriptions, or pass a call off as a delivery. The sidecar's own requests do not come this way.

use percent_encoding::percent_decode_str;

/// Those over gRPC. Not `AppCallbackHealthCheck`: whether an application is well, peers may ask.
const CALLBACKS: [&str; 2] =
    ["dapr.proto.runtime.v1.AppCallback", "dapr.proto.runtime.v1.AppCallbackAlpha"];

/// Whether a path leads to a callback, in any spelling that web frameworks take for the same.
pub(super) fn is_reserved(path: &str) -> bool {
    let path = percent_decode_str(path).decode_utf8_lossy();
    // So for nearly every path.
    if !path.as_bytes().windows(4).any(|word| word.eq_ignore_ascii_case(b"dapr")) {
        return false;
    }
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split(['/', '\\']) {
        // Java's frameworks leave out what follows a semicolon.
        match segment.split(';').next().unwrap_or_default() {
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment),
        }
    }
    match segments.as_slice() {
        [first, second] if first.eq_ignore_ascii_case("dapr") => {
            second.eq_ignore_ascii_case("subscribe")
        }
        [first, _method] => CALLBACKS.iter().any(|service| first.eq_ignore_ascii_case(service)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callbacks_are_told_from_paths_of_applications() {
        for path in [
            "/dapr/subscribe",
            "/dapr/subscribe/",
            "//dapr//subscribe",
            "/DAPR/Subscribe",
            "/%64apr%2fsubscribe",
            "/x/../dapr/./subscribe;a=b",
            "/dapr.proto.runtime.v1.AppCallback/OnTopicEvent",
            "/dapr.proto.runtime.v1.AppCallback/OnInvoke",
            "/dapr.proto.runtime.v1.AppCallbackAlpha/OnBulkTopicEventAlpha1",
            "/Dapr.Proto.Runtime.V1.AppCallback/OnTopicEvent",
        ] {
            assert!(is_reserved(path), "{path}");
        }
        for path in [
            "",
            "/",
            "*",
            "/dapr",
            "/dapr/subscribers",
            "/dapr/subscribe/more",
            "/dapr/config",
            "/api/dapr/subscribe",
            "/events/orders",
            "/dapr.proto.runtime.v1.Dapr/InvokeService",
            "/dapr.proto.runtime.v1.AppCallbackHealthCheck/HealthCheck",
            "/shop.Orders/Place",
        ] {
            assert!(!is_reserved(path), "{path}");
        }
    }
}
