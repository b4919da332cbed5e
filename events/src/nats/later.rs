//! Events for later: the server keeps each under a subject of its own, and stores it as an event of the topic when it
//! is due. So it takes up no room in what a subscription has in hand, however many wait. Pure.
//!
//! Only for servers from 2.12 on. On older ones an event for later is stored like any other, and given back to
//! JetStream until it is due.

use async_nats::HeaderMap;
use async_nats::jetstream::stream;
use uuid::Uuid;

/// Which server has message schedules.
pub(super) const SINCE: (i64, i64, i64) = (2, 12, 0);
/// The server counts nanoseconds and ends in 2262: what is due later is handed out now and given back.
const LAST_MS: u64 = 7_258_118_400_000;

/// Under which subjects a topic's events wait.
fn waiting(subject: &str) -> String {
    format!("{subject}.later.*")
}

/// The stream with what it needs for events that wait.
pub(super) fn allow(mut config: stream::Config, subject: &str) -> stream::Config {
    if !allowed(&config, subject) {
        config.subjects.push(waiting(subject));
        config.allow_message_schedules = true;
        // What waits does not grow too old; see `schedule`.
        config.allow_message_ttl = true;
    }
    config
}

/// Whether the stream has it.
pub(super) fn allowed(config: &stream::Config, subject: &str) -> bool {
    config.allow_message_schedules
        && config.allow_message_ttl
        && config.subjects.contains(&waiting(subject))
}

/// Asks the server to keep a message until then. Returns the subject to publish it to: one of its own, since a server
/// keeps one message for each.
pub(super) fn schedule(headers: &mut HeaderMap, subject: &str, at_ms: u64) -> Option<String> {
    let at_ms = i64::try_from(at_ms.min(LAST_MS)).ok()?;
    let at = jiff::Timestamp::from_millisecond(at_ms).ok()?;
    headers.insert("Nats-Schedule", format!("@at {at}"));
    headers.insert("Nats-Schedule-Target", subject);
    // It becomes an event of the topic when it is due, and the topic's retention counts from then.
    headers.insert("Nats-TTL", "never");
    Some(format!("{subject}.later.{}", Uuid::new_v4().simple()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_has_a_subject_of_its_own_and_names_the_topics() {
        let mut headers = HeaderMap::new();
        let one = schedule(&mut headers, "duet.t", 1_500).unwrap();
        let two = schedule(&mut headers, "duet.t", 1_500).unwrap();
        assert!(one.starts_with("duet.t.later.") && one != two, "{one}, {two}");
        let header = |name| headers.get(name).unwrap().as_str();
        assert_eq!(header("Nats-Schedule"), "@at 1970-01-01T00:00:01.5Z");
        assert_eq!(header("Nats-Schedule-Target"), "duet.t");
    }

    #[test]
    fn a_time_that_the_server_cannot_count_is_the_last_that_it_can() {
        let mut headers = HeaderMap::new();
        assert!(schedule(&mut headers, "duet.t", u64::MAX).is_some());
        assert_eq!(headers.get("Nats-Schedule").unwrap().as_str(), "@at 2200-01-01T00:00:00Z");
    }

    #[test]
    fn a_stream_is_changed_once() {
        let config = stream::Config { subjects: vec!["duet.t".to_owned()], ..Default::default() };
        assert!(!allowed(&config, "duet.t"));
        let changed = allow(config, "duet.t");
        assert!(allowed(&changed, "duet.t"));
        assert_eq!(allow(changed.clone(), "duet.t").subjects, changed.subjects);
    }
}
