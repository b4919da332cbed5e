//! `duet.v1.PublishRequest`, written by hand so that its events stay encoded until somebody asks for them.
//!
//! An event without content has two bytes on the wire and some hundred in memory. Whoever serves publishes looks at
//! how many there are, and makes room for them, before they exist.

use bytes::{BufMut, Bytes};
use prost::encoding::{self, DecodeContext, WireType};
use prost::{DecodeError, Message};

use crate::proto::Event;

/// The numbers of the fields in `bus.proto`.
const CORRELATION: u32 = 1;
const BUS: u32 = 2;
const TOPIC: u32 = 3;
const EVENTS: u32 = 4;
/// `Event.attributes`.
const ATTRIBUTES: u32 = 5;

/// What an event takes in memory besides its bytes: the structure, as long as it is converted twice, and what the
/// allocator adds to its strings and to the first node of its attributes.
const EVENT_OVERHEAD: usize = 1024;
/// The same for one attribute, also where it is noted that it is no string.
const ATTRIBUTE_OVERHEAD: usize = 200;

/// Events to publish to one topic, all or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublishRequest {
    /// Names the request in its answer.
    pub correlation: u64,
    /// The bus.
    pub bus: String,
    /// The topic.
    pub topic: String,
    /// The events.
    pub events: EncodedEvents,
}

/// Events as they are on the wire.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct EncodedEvents {
    /// One field [`EVENTS`] after the other.
    bytes: Vec<u8>,
    count: usize,
    attributes: usize,
}

/// The same bytes, as a message.
#[derive(Clone, PartialEq, Message)]
struct Events {
    #[prost(message, repeated, tag = "4")]
    events: Vec<Event>,
}

impl EncodedEvents {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many attributes they have together, `id`, `source` and `type` not counted.
    #[must_use]
    pub fn attributes(&self) -> usize {
        self.attributes
    }

    /// Bytes of memory that they take at most once they are decoded, and once they are encoded again for a log.
    #[must_use]
    pub fn decoded_bytes(&self) -> usize {
        let overhead = self.count * EVENT_OVERHEAD + self.attributes * ATTRIBUTE_OVERHEAD;
        self.bytes.len() * 2 + overhead
    }

    /// The events.
    ///
    /// # Errors
    /// When one of them is not encoded correctly.
    pub fn decode(self) -> Result<Vec<Event>, DecodeError> {
        Events::decode(Bytes::from(self.bytes)).map(|decoded| decoded.events)
    }

    fn merge(
        &mut self,
        wire_type: WireType,
        buf: &mut impl bytes::Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        if self.bytes.is_empty() {
            // Nearly all of the message is events.
            self.bytes.reserve(buf.remaining());
        }
        let mut event = Bytes::new();
        encoding::bytes::merge(wire_type, &mut event, buf, context)?;
        encoding::bytes::encode(EVENTS, &event, &mut self.bytes);
        self.count += 1;
        self.attributes += attributes(event)?;
        Ok(())
    }
}

impl From<Vec<Event>> for EncodedEvents {
    fn from(events: Vec<Event>) -> Self {
        let count = events.len();
        let attributes = events.iter().map(|event| event.attributes.len()).sum();
        Self { bytes: Events { events }.encode_to_vec(), count, attributes }
    }
}

impl std::fmt::Debug for EncodedEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} events of {} bytes", self.count, self.bytes.len())
    }
}

/// Counts the attributes of one encoded event.
fn attributes(mut event: Bytes) -> Result<usize, DecodeError> {
    let mut count = 0;
    while !event.is_empty() {
        let (tag, wire_type) = encoding::decode_key(&mut event)?;
        count += usize::from(tag == ATTRIBUTES);
        encoding::skip_field(wire_type, tag, &mut event, DecodeContext::default())?;
    }
    Ok(count)
}

impl Message for PublishRequest {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        if self.correlation != 0 {
            encoding::uint64::encode(CORRELATION, &self.correlation, buf);
        }
        if !self.bus.is_empty() {
            encoding::string::encode(BUS, &self.bus, buf);
        }
        if !self.topic.is_empty() {
            encoding::string::encode(TOPIC, &self.topic, buf);
        }
        buf.put_slice(&self.events.bytes);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl bytes::Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            CORRELATION => encoding::uint64::merge(wire_type, &mut self.correlation, buf, context),
            BUS => encoding::string::merge(wire_type, &mut self.bus, buf, context),
            TOPIC => encoding::string::merge(wire_type, &mut self.topic, buf, context),
            EVENTS => self.events.merge(wire_type, buf, context),
            _ => encoding::skip_field(wire_type, tag, buf, context),
        }
    }

    fn encoded_len(&self) -> usize {
        let text = |tag, text: &String| {
            if text.is_empty() { 0 } else { encoding::string::encoded_len(tag, text) }
        };
        let correlation = match self.correlation {
            0 => 0,
            _ => encoding::uint64::encoded_len(CORRELATION, &self.correlation),
        };
        correlation + text(BUS, &self.bus) + text(TOPIC, &self.topic) + self.events.bytes.len()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As `prost` would make it of `bus.proto`.
    #[derive(Clone, PartialEq, Message)]
    struct Generated {
        #[prost(uint64, tag = "1")]
        correlation: u64,
        #[prost(string, tag = "2")]
        bus: String,
        #[prost(string, tag = "3")]
        topic: String,
        #[prost(message, repeated, tag = "4")]
        events: Vec<Event>,
    }

    fn event() -> impl Strategy<Value = Event> {
        let attributes = prop::collection::btree_map("[a-z]{1,9}", ".{0,9}", 0..4);
        let data = prop::option::of(prop::collection::vec(any::<u8>(), 0..99));
        ("[a-z0-9]{0,9}", attributes, data).prop_map(|(id, attributes, data)| Event {
            id,
            source: "/here".into(),
            spec_version: "1.0".into(),
            r#type: "made".into(),
            typed: attributes.keys().next().cloned().unwrap_or_default(),
            attributes,
            data: data.map(Bytes::from),
            ..Event::default()
        })
    }

    proptest! {
        #[test]
        fn it_is_the_message_of_the_contract(
            correlation in any::<u64>(),
            bus in ".{0,9}",
            topic in ".{0,9}",
            events in prop::collection::vec(event(), 0..5),
        ) {
            let attributes = events.iter().map(|event| event.attributes.len()).sum::<usize>();
            let (bus, topic) = (bus.clone(), topic.clone());
            let generated =
                Generated { correlation, bus: bus.clone(), topic: topic.clone(), events };
            let events = generated.events.clone().into();
            let request = PublishRequest { correlation, bus, topic, events };
            let bytes = request.encode_to_vec();
            prop_assert_eq!(&bytes, &generated.encode_to_vec());
            let read = PublishRequest::decode(bytes.as_slice()).unwrap();
            prop_assert_eq!(&read, &request);
            prop_assert_eq!(read.events.len(), generated.events.len());
            prop_assert_eq!(read.events.attributes(), attributes);
            prop_assert_eq!(read.events.decode().unwrap(), generated.events);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(request) = PublishRequest::decode(bytes.as_slice()) {
                drop(request.events.decode());
            }
        }
    }

    #[test]
    fn events_without_content_take_no_more_than_they_have_on_the_wire() {
        let read = PublishRequest::decode([0x22, 0].repeat(1_000_000).as_slice()).unwrap();
        assert_eq!(read.events.len(), 1_000_000);
        assert!(read.events.bytes.capacity() < 4_000_000, "{}", read.events.bytes.capacity());
        assert!(read.events.decoded_bytes() > 1_000_000_000);
    }

    #[test]
    fn a_request_that_is_cut_short_is_refused() {
        for bytes in [&[0x22, 9, 1][..], &[0x22, 2, 0x2a, 9], &[0x24], &[0x20, 1]] {
            assert!(PublishRequest::decode(bytes).is_err(), "{bytes:?}");
        }
    }
}
