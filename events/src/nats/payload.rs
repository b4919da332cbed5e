//! How large an event may be on the cluster, beside how large the API takes it. Pure.

/// Largest body of one publish to a sidecar.
const LARGEST_BODY: u64 = 4 << 20;
/// For the event's attributes and the publish's own headers, which count as well.
const HEADERS: u64 = 64 << 10;

/// What to tell of a server with this `max_payload`, where it takes less than sidecars do.
#[must_use]
pub fn payload_warning(max_payload: u64) -> Option<String> {
    (max_payload < LARGEST_BODY + HEADERS).then(|| {
        format!(
            "NATS takes messages of up to {max_payload} bytes, and sidecars take events of 4 MiB: larger ones are refused, \
             those from an outbox after they were acknowledged; set `max_payload: 8MB` on the servers; see docs/nats.md"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_own_limit_is_too_small_and_what_is_told_instead_is_not() {
        assert!(payload_warning(1 << 20).is_some_and(|text| text.contains("1048576")));
        assert!(payload_warning(4 << 20).is_some(), "the largest body has headers too");
        assert_eq!(payload_warning(8_000_000), None);
    }
}
