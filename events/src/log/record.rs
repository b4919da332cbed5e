//! What is written to the store, and how it is sealed. Pure.

use duet_api::proto;
use prost::Message;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes in front of a record: its checksum.
const SEAL: usize = 8;

/// An event as it lies in a topic.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Record {
    /// Milliseconds since the epoch.
    #[prost(uint64, tag = "1")]
    pub(crate) published_ms: u64,
    #[prost(message, optional, tag = "2")]
    pub(crate) event: Option<proto::Event>,
    /// In an outbox: the topic on the bus that it is for. Empty elsewhere.
    #[prost(string, tag = "3")]
    pub(crate) route: String,
}

/// A topic's settings and bounds; written with every batch that changes them.
#[derive(Clone, PartialEq, Message)]
pub(super) struct TopicRow {
    #[prost(uint32, tag = "1")]
    pub(super) id: u32,
    /// Oldest position that is kept.
    #[prost(uint64, tag = "2")]
    pub(super) first: u64,
    /// Position of the next event.
    #[prost(uint64, tag = "3")]
    pub(super) next: u64,
    /// Bytes of all kept records.
    #[prost(uint64, tag = "4")]
    pub(super) bytes: u64,
    #[prost(uint64, tag = "5")]
    pub(super) dedup_window_ms: u64,
    #[prost(uint64, optional, tag = "6")]
    pub(super) retention_age_ms: Option<u64>,
    #[prost(uint64, optional, tag = "7")]
    pub(super) retention_bytes: Option<u64>,
    /// Positions from `first` on whose event was removed by hand.
    #[prost(uint64, tag = "8")]
    pub(super) holes: u64,
    /// Retention takes what nobody handled, too.
    #[prost(bool, tag = "9")]
    pub(super) drop_unhandled: bool,
    /// The attribute by which ordered subscriptions order; empty for the default.
    #[prost(string, tag = "10")]
    pub(super) order_by: String,
    /// A resource declared it.
    #[prost(bool, tag = "11")]
    pub(super) declared: bool,
}

/// A declared subscription.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SubscriptionRow {
    #[prost(uint32, tag = "1")]
    pub(super) id: u32,
    #[prost(string, tag = "2")]
    pub(super) topic: String,
    #[prost(string, tag = "3")]
    pub(super) dead_letter_topic: String,
    /// Nothing is handed out.
    #[prost(bool, tag = "4")]
    pub(super) paused: bool,
    /// It asks for order.
    #[prost(bool, tag = "5")]
    pub(super) ordered: bool,
    /// The attribute by which its events are in order now; empty for none. Follows `ordered` and the topic.
    #[prost(string, tag = "6")]
    pub(super) order_by: String,
    /// For the hash of the keys, so that no publisher can make two keys collide.
    #[prost(fixed64, tag = "7")]
    pub(super) seed: u64,
    #[prost(uint64, optional, tag = "8")]
    pub(super) idle_expiry_ms: Option<u64>,
    /// Since when it has no consumer; 0: it has one, or nobody looked yet.
    #[prost(uint64, tag = "9")]
    pub(super) idle_since_ms: u64,
    /// A resource declared it: whoever looks after the bus may forget it when there is none any more.
    #[prost(bool, tag = "10")]
    pub(super) declared: bool,
    /// Counts how often it was moved; see [`super::consumers::Open`]. Tells receivers an event that is replayed from one
    /// whose acknowledgement was lost, so it is never used again.
    #[prost(uint32, tag = "11")]
    pub(super) epoch: u32,
}

/// How far a subscription is: every position below `cursor` is settled, except those in `fresh` and those with
/// an [`AttemptRow`].
#[derive(Clone, PartialEq, Message)]
pub(super) struct ProgressRow {
    #[prost(uint64, tag = "1")]
    pub(super) cursor: u64,
    #[prost(uint64, repeated, tag = "2")]
    pub(super) fresh: Vec<u64>,
    /// Keys of an ordered subscription whose events are not settled from some position on.
    #[prost(message, repeated, tag = "3")]
    pub(super) lanes: Vec<LaneRow>,
}

/// A key whose events from `from` to the cursor were put off, but for those published for later.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct LaneRow {
    /// Its hash.
    #[prost(fixed64, tag = "1")]
    pub(super) key: u64,
    #[prost(uint64, tag = "2")]
    pub(super) from: u64,
    /// How many they are.
    #[prost(uint64, tag = "3")]
    pub(super) events: u64,
}

/// History of one unsettled event.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(super) struct AttemptRow {
    /// Attempts spent.
    #[prost(uint32, tag = "1")]
    pub(super) spent: u32,
    /// Not delivered before this time.
    #[prost(uint64, tag = "2")]
    pub(super) not_before_ms: u64,
    /// Hash of the key that it holds back; 0 for none.
    #[prost(fixed64, tag = "3")]
    pub(super) key: u64,
    /// It was published for that time.
    #[prost(bool, tag = "4")]
    pub(super) scheduled: bool,
    /// What the clock said when it was written; 0 of one that is scheduled. A clock that says less now was set back.
    #[prost(uint64, tag = "5")]
    pub(super) noted_ms: u64,
}

/// Where a record lies: topic id and position.
pub(super) type Place = (u32, u64);

/// The checksum covers the place too, so that a record found elsewhere is noticed.
fn checksum(place: Place, payload: &[u8]) -> [u8; SEAL] {
    let seed = (u64::from(place.0) << 40) ^ place.1;
    xxh3_64_with_seed(payload, seed).to_le_bytes()
}

/// A record in its stored form, but for the seal: that needs its place.
#[derive(Debug)]
pub(super) struct Unsealed(Vec<u8>);

impl Unsealed {
    pub(super) fn new(record: &Record) -> Self {
        let mut frame = Vec::with_capacity(SEAL + record.encoded_len());
        frame.resize(SEAL, 0);
        record.encode_raw(&mut frame);
        Self(frame)
    }

    /// Bytes that it takes in the store.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The stored form.
    pub(super) fn seal(self, place: Place) -> Vec<u8> {
        let mut frame = self.0;
        if let Some((seal, payload)) = frame.split_first_chunk_mut() {
            *seal = checksum(place, payload);
        }
        frame
    }
}

/// The record, or `None` if it is damaged.
pub(super) fn unseal(place: Place, frame: &[u8]) -> Option<Record> {
    let (seal, payload) = frame.split_at_checked(SEAL)?;
    if seal != checksum(place, payload) {
        return None;
    }
    Record::decode(payload).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::collections::BTreeMap;

    use super::*;

    /// As it was before attributes had types.
    #[derive(Clone, PartialEq, Message)]
    struct OlderRecord {
        #[prost(uint64, tag = "1")]
        published_ms: u64,
        #[prost(message, optional, tag = "2")]
        event: Option<OlderEvent>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct OlderEvent {
        #[prost(string, tag = "1")]
        id: String,
        #[prost(btree_map = "string, string", tag = "5")]
        attributes: BTreeMap<String, String>,
    }

    #[test]
    fn records_are_read_by_older_and_newer_versions_and_no_larger_without_types() {
        let attributes = BTreeMap::from([("priority".to_owned(), "5".to_owned())]);
        let event = OlderEvent { id: "1".into(), attributes: attributes.clone() };
        let older = OlderRecord { published_ms: 7, event: Some(event) };
        let event = proto::Event { id: "1".into(), attributes, ..proto::Event::default() };
        let record = |event| Record { published_ms: 7, event: Some(event), route: String::new() };
        let untyped = record(event.clone());
        assert_eq!(Record::decode(&*older.encode_to_vec()), Ok(untyped.clone()));
        let frame = Unsealed::new(&untyped).seal((1, 1));
        assert_eq!(frame[SEAL..], older.encode_to_vec());
        let typed = record(proto::Event { typed: "priority".into(), ..event });
        let frame = Unsealed::new(&typed).seal((1, 1));
        assert_eq!(unseal((1, 1), &frame), Some(typed));
        assert_eq!(OlderRecord::decode(&frame[SEAL..]), Ok(older));
    }

    proptest! {
        #[test]
        fn any_change_of_bytes_or_place_is_noticed(
            route in "[a-z]{1,40}", at in 0_usize..1000, flip in 1_u8..=255, place: (u32, u64),
        ) {
            let record = Record { published_ms: 7, event: None, route };
            let mut frame = Unsealed::new(&record).seal(place);
            prop_assert_eq!(unseal(place, &frame), Some(record));
            prop_assert_eq!(unseal((place.0, place.1 ^ 1), &frame), None);
            let at = at % frame.len();
            frame[at] ^= flip;
            prop_assert_eq!(unseal(place, &frame), None);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            prop_assert_eq!(unseal((1, 1), &bytes), None);
        }
    }
}
