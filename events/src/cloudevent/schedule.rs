//! The attributes that say when an event may be delivered, and with which others it keeps its order.

use jiff::Timestamp;

use super::{EnvelopeError, Event};

/// Extension attribute of the `CloudEvents` partitioning extension: events with the same key keep their order in
/// `ordered` subscriptions.
pub const PARTITION_KEY: &str = "partitionkey";
/// Extension attribute of the `CloudEvents` expiry-time extension (RFC 3339): not delivered afterwards.
pub const EXPIRY_TIME: &str = "expirytime";
/// Extension attribute (RFC 3339): not delivered before.
pub const DELIVER_AT: &str = "deliverat";

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

/// A time, in milliseconds since the epoch; one before it is 0.
pub(crate) fn millis(text: &str) -> Option<u64> {
    let time: Timestamp = text.parse().ok()?;
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
    fn times_are_read_and_bad_ones_named() {
        let event = Event::new("1", "/s", "t").unwrap();
        assert_eq!((event.expires_ms(), event.deliver_at_ms()), (None, None));
        let event = event.with_attribute(EXPIRY_TIME, "1970-01-01T00:00:01.5Z").unwrap();
        assert_eq!(event.expires_ms(), Some(1500));
        assert_eq!(event.check_schedule(), Ok(()));
        let event = event.with_attribute(DELIVER_AT, "tomorrow").unwrap();
        let error = event.check_schedule().unwrap_err();
        assert_eq!(error.attribute(), Some(DELIVER_AT));
    }
}
