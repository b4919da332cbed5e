//! The attributes that say when an event may be delivered, and with which others it keeps its order.

use duet_api::proto;
use jiff::{SignedDuration, Timestamp};

use super::{EnvelopeError, Event};

/// Extension attribute of the `CloudEvents` partitioning extension: events with the same key keep their order in
/// `ordered` subscriptions.
pub const PARTITION_KEY: &str = "partitionkey";
/// Extension attribute of the `CloudEvents` expiry-time extension (RFC 3339): not delivered afterwards.
pub const EXPIRY_TIME: &str = "expirytime";
/// Extension attribute (RFC 3339): not delivered before.
pub const DELIVER_AT: &str = "deliverat";

/// Clocks that differ by less are the same clock: so long may an event be on its way.
const SAME_CLOCK: SignedDuration = SignedDuration::from_secs(1);

/// Which times of an event were computed by the clock of its publisher's sidecar. A bus judges them by its own clock, so
/// they change with the clock when the event arrives there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LocalTimes {
    pub(super) expiry: bool,
    pub(super) delivery: bool,
}

impl Event {
    /// When it is no longer delivered, in milliseconds since the epoch.
    #[must_use]
    pub fn expires_ms(&self) -> Option<u64> {
        self.attribute(EXPIRY_TIME).and_then(millis)
    }

    /// Before when it is not delivered, in milliseconds since the epoch.
    #[must_use]
    pub fn deliver_at_ms(&self) -> Option<u64> {
        self.attribute(DELIVER_AT).and_then(millis)
    }

    /// What it keeps its order by, in a topic that orders by this attribute.
    #[must_use]
    pub fn order_key(&self, order_by: &str) -> Option<&str> {
        let required = [self.id(), self.source(), self.event_type()];
        order_key(order_by, required, |name| self.attribute(name))
    }

    /// No longer delivered from a time on that this machine's clock will have.
    #[must_use]
    pub fn expiring(mut self, at: Timestamp) -> Self {
        self.put(EXPIRY_TIME, at.to_string());
        self.local.expiry = true;
        self
    }

    /// Not delivered before this machine's clock has a time.
    #[must_use]
    pub fn delayed(mut self, until: Timestamp) -> Self {
        self.put(DELIVER_AT, until.to_string());
        self.local.delivery = true;
        self
    }

    /// As it is sent to a bus by a machine whose clock has this time.
    #[must_use]
    pub fn sent(self, now: Timestamp) -> proto::Event {
        let told = self.local != LocalTimes::default();
        let sent_ms = if told { u64::try_from(now.as_millisecond()).unwrap_or(0) } else { 0 };
        proto::Event { sent_ms, ..self.into() }
    }

    /// As it arrives at a bus whose clock has this time: what its sender computed by another clock is by this one then.
    ///
    /// # Errors
    /// When it is not valid.
    pub fn arrived(raw: proto::Event, now: Timestamp) -> Result<Self, EnvelopeError> {
        let sent = i64::try_from(raw.sent_ms).ok().filter(|ms| *ms > 0);
        let sent = sent.and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let mut event = Self::try_from(raw)?;
        let local = std::mem::take(&mut event.local);
        let difference = sent.map(|sent| now.duration_since(sent));
        let Some(difference) = difference.filter(|difference| difference.abs() >= SAME_CLOCK)
        else {
            return Ok(event);
        };
        for name in [(EXPIRY_TIME, local.expiry), (DELIVER_AT, local.delivery)]
            .into_iter()
            .filter_map(|(name, local)| local.then_some(name))
        {
            if let Some(text) = event.attributes.get_mut(name)
                && let Ok(at) = text.parse::<Timestamp>()
                && let Ok(at) = at.checked_add(difference)
            {
                *text = at.to_string();
            }
        }
        Ok(event)
    }

    /// Checks what this module reads: a time that cannot be read must not be ignored.
    ///
    /// # Errors
    /// When one of the times is not RFC 3339.
    pub fn check_schedule(&self) -> Result<(), EnvelopeError> {
        for name in [EXPIRY_TIME, DELIVER_AT] {
            if self.attribute(name).is_some_and(|value| millis(value).is_none()) {
                return Err(EnvelopeError::invalid(name, "is not a time as in RFC 3339"));
            }
        }
        Ok(())
    }
}

/// The attribute by which an event keeps its order with others, the same for every bus: any of them, also one that is
/// required.
pub(crate) fn order_key<'a>(
    order_by: &str,
    [id, source, event_type]: [&'a str; 3],
    attribute: impl FnOnce(&str) -> Option<&'a str>,
) -> Option<&'a str> {
    match order_by {
        "" => None,
        "id" => Some(id),
        "source" => Some(source),
        "type" => Some(event_type),
        other => attribute(other),
    }
}

/// A time. The last two days of the year 9999, which people write for ever, end after the last time that can be counted:
/// then they are that one.
pub(super) fn time(text: &str) -> Option<Timestamp> {
    text.parse().ok().or_else(|| {
        let day = text.strip_prefix("9999-12-3").filter(|day| day.starts_with(['0', '1']))?;
        // What is wrong with it otherwise shows on another day as well.
        format!("9999-12-2{day}").parse::<Timestamp>().ok().map(|_| Timestamp::MAX)
    })
}

/// A time, in milliseconds since the epoch; one before it is 0.
pub(crate) fn millis(text: &str) -> Option<u64> {
    let time = time(text)?;
    Some(u64::try_from(time.as_millisecond()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_attribute_can_be_what_an_event_is_ordered_by() {
        let event = Event::new("1", "/s", "t").unwrap();
        let event = event.with_attribute(PARTITION_KEY, "k").unwrap();
        for (order_by, key) in [
            ("id", Some("1")),
            ("source", Some("/s")),
            ("type", Some("t")),
            (PARTITION_KEY, Some("k")),
            ("subject", None),
            ("", None),
        ] {
            assert_eq!(event.order_key(order_by), key, "{order_by}");
        }
    }

    #[test]
    fn a_bus_takes_times_of_another_clock_as_its_own_and_leaves_those_of_the_application() {
        let at = |text: &str| -> Timestamp { text.parse().unwrap() };
        let event = Event::new("1", "/s", "t").unwrap();
        let event = event.with_attribute(DELIVER_AT, "2026-01-01T00:00:30Z").unwrap();
        let event = event.expiring(at("2026-01-01T00:01:00Z"));
        // By way of an outbox.
        let event = Event::try_from(proto::Event::from(event)).unwrap();
        let sent = event.sent(at("2026-01-01T00:00:10Z"));
        for (now, expires) in [
            ("2026-01-01T00:00:10.999Z", "2026-01-01T00:01:00Z"),
            ("2026-01-01T00:02:10.5Z", "2026-01-01T00:03:00.5Z"),
            ("2025-12-31T23:59:10Z", "2026-01-01T00:00:00Z"),
        ] {
            let event = Event::arrived(sent.clone(), at(now)).unwrap();
            assert_eq!(event.attribute(EXPIRY_TIME), Some(expires), "{now}");
            assert_eq!(event.attribute(DELIVER_AT), Some("2026-01-01T00:00:30Z"), "{now}");
            assert!(!proto::Event::from(event).local_expiry, "nobody shifts it again");
        }
        let event = Event::new("1", "/s", "t").unwrap().delayed(at("2026-01-01T00:00:30Z"));
        let sent = event.sent(at("2026-01-01T00:00:10Z"));
        let event = Event::arrived(sent.clone(), at("2026-01-01T00:00:05Z")).unwrap();
        assert_eq!(event.attribute(DELIVER_AT), Some("2026-01-01T00:00:25Z"));
        for sent_ms in [0, 1, u64::MAX] {
            let raw = proto::Event { sent_ms, ..sent.clone() };
            assert!(Event::arrived(raw, Timestamp::MAX).is_ok(), "{sent_ms}");
        }
    }

    #[test]
    fn times_are_read_and_bad_ones_named() {
        let event = Event::new("1", "/s", "t").unwrap();
        assert_eq!((event.expires_ms(), event.deliver_at_ms()), (None, None));
        let event = event.with_attribute(EXPIRY_TIME, "1970-01-01T00:00:01.5Z").unwrap();
        assert_eq!(event.expires_ms(), Some(1500));
        assert_eq!(event.check_schedule(), Ok(()));
        for last in ["9999-12-31T23:59:59Z", "9999-12-30t23:00:00.5-12:00"] {
            let event = event.clone().with_attribute(EXPIRY_TIME, last).unwrap();
            let event = event.with_attribute("time", last).unwrap();
            assert_eq!(
                (event.expires_ms(), event.check_schedule()),
                (Some(253_402_207_200_999), Ok(()))
            );
        }
        for none in ["9999-12-32T00:00:00Z", "9999-12-31T25:00:00Z", "9999-12-31T23:59:59"] {
            assert_eq!(millis(none), None, "{none}");
            assert!(event.clone().with_attribute("time", none).is_err(), "{none}");
        }
        let event = event.with_attribute(DELIVER_AT, "tomorrow").unwrap();
        let error = event.check_schedule().unwrap_err();
        assert_eq!(error.attribute(), Some(DELIVER_AT));
    }
}
