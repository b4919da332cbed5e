//! `CloudEvents` 1.0: the model and its HTTP binding (binary, structured and batch mode), plus Dapr's wrapping
//! of plain bodies.
//!
//! Pure: no I/O, no clock; sizes are the caller's to bound. Imports nothing of this crate.

mod attribute;
mod decode;
mod encode;
mod header;
mod members;
mod schedule;
mod show;
mod trace;
mod typed;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use duet_api::proto;

pub(crate) use attribute::clean_text;
pub use decode::{WrapContext, decode, decode_filling, decode_opaque};
pub use encode::{encode_batch, encode_binary, encode_structured, is_json, is_text};
use schedule::LocalTimes;
pub use schedule::{DELIVER_AT, EXPIRY_TIME, PARTITION_KEY};
pub(crate) use schedule::{millis, order_key};
pub use show::shown;
pub use typed::AttributeValue;

/// Content type of one structured event.
pub const STRUCTURED_CONTENT_TYPE: &str = "application/cloudevents+json";
/// Content type of a batch.
pub const BATCH_CONTENT_TYPE: &str = "application/cloudevents-batch+json";

/// An event whose attributes are known to be valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    id: String,
    source: String,
    event_type: String,
    attributes: BTreeMap<String, String>,
    /// Names of the attributes that are numbers or booleans in JSON, see [`typed`].
    typed: BTreeSet<String>,
    data: Option<Bytes>,
    local: LocalTimes,
}

impl Event {
    /// An event with the required attributes; `specversion` is always 1.0.
    ///
    /// # Errors
    /// When one of them is empty or has characters that its type forbids.
    pub fn new(
        id: impl Into<String>,
        source: impl Into<String>,
        event_type: impl Into<String>,
    ) -> Result<Self, EnvelopeError> {
        let (id, source, event_type) = (id.into(), source.into(), event_type.into());
        attribute::check("id", &id)?;
        attribute::check("source", &source)?;
        attribute::check("type", &event_type)?;
        let (attributes, typed) = (BTreeMap::new(), BTreeSet::new());
        let local = LocalTimes::default();
        Ok(Self { id, source, event_type, attributes, typed, data: None, local })
    }

    /// With one more attribute, optional or extension, as a string; replaces an older value.
    ///
    /// # Errors
    /// When name or value are not valid, or when the name is one of a required attribute or of the data.
    pub fn with_attribute(mut self, name: &str, value: &str) -> Result<Self, EnvelopeError> {
        self.set_attribute(name, value.to_owned())?;
        Ok(self)
    }

    /// With another `id`, `source` and `type`, where they are given.
    ///
    /// # Errors
    /// When one of them is empty or has characters that its type forbids.
    pub fn renamed(
        self,
        id: Option<&str>,
        source: Option<&str>,
        event_type: Option<&str>,
    ) -> Result<Self, EnvelopeError> {
        let named = Self::new(
            id.unwrap_or(&self.id),
            source.unwrap_or(&self.source),
            event_type.unwrap_or(&self.event_type),
        )?;
        Ok(Self { id: named.id, source: named.source, event_type: named.event_type, ..self })
    }

    /// With data.
    #[must_use]
    pub fn with_data(mut self, data: impl Into<Bytes>) -> Self {
        self.data = Some(data.into());
        self
    }

    fn set_attribute(&mut self, name: &str, value: String) -> Result<(), EnvelopeError> {
        attribute::check_name(name)?;
        attribute::check(name, &value)?;
        self.put(name, value);
        Ok(())
    }

    /// Sets an attribute that needs no look.
    fn put(&mut self, name: &str, value: String) {
        self.typed.remove(name);
        self.attributes.insert(name.to_owned(), value);
    }

    /// Without an optional attribute or extension.
    pub(crate) fn remove_attribute(&mut self, name: &str) {
        self.attributes.remove(name);
        self.typed.remove(name);
    }

    /// Attribute `id`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Attribute `source`.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Attribute `type`.
    #[must_use]
    pub fn event_type(&self) -> &str {
        &self.event_type
    }

    /// Any other attribute, by its lower-case name.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    /// All attributes except `id`, `source`, `type` and `specversion`, in their canonical string form.
    #[must_use]
    pub fn attributes(&self) -> &BTreeMap<String, String> {
        &self.attributes
    }

    /// Attribute `datacontenttype`.
    #[must_use]
    pub fn data_content_type(&self) -> Option<&str> {
        self.attribute("datacontenttype")
    }

    /// The payload.
    #[must_use]
    pub fn data(&self) -> Option<&Bytes> {
        self.data.as_ref()
    }

    /// About what this event takes in memory and on the wire, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        let attributes: usize = self.attributes.iter().map(|(k, v)| k.len() + v.len() + 4).sum();
        let typed: usize = self.typed.iter().map(|name| name.len() + 1).sum();
        let data = self.data.as_ref().map_or(0, Bytes::len);
        self.id.len() + self.source.len() + self.event_type.len() + attributes + typed + data + 16
    }
}

impl TryFrom<proto::Event> for Event {
    type Error = EnvelopeError;

    fn try_from(raw: proto::Event) -> Result<Self, EnvelopeError> {
        attribute::check_spec_version(&raw.spec_version)?;
        // What a bus adds to an event that was published as large as may be has room, too.
        attribute::check_count(raw.attributes.len() / 2)?;
        let mut event = Self::new(raw.id, raw.source, raw.r#type)?;
        for (name, value) in raw.attributes {
            event.set_attribute(&name, value)?;
        }
        event.note_typed(&raw.typed);
        event.data = raw.data;
        event.local = LocalTimes { expiry: raw.local_expiry, delivery: raw.local_delivery };
        Ok(event)
    }
}

impl From<Event> for proto::Event {
    fn from(event: Event) -> Self {
        let typed = event.typed_names();
        Self {
            id: event.id,
            source: event.source,
            spec_version: "1.0".to_owned(),
            r#type: event.event_type,
            attributes: event.attributes.into_iter().collect(),
            data: event.data,
            local_expiry: event.local.expiry,
            local_delivery: event.local.delivery,
            sent_ms: 0,
            typed,
        }
    }
}

/// Why a request holds no valid event. All of them are the publisher's to mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// A required attribute is absent.
    #[error("attribute {attribute} is missing")]
    Missing {
        /// Its name.
        attribute: &'static str,
    },
    /// An attribute (or the data member) is not what its type allows.
    #[error("attribute {attribute}: {reason}")]
    Invalid {
        /// Its name, shortened if it is long.
        attribute: String,
        /// What is wrong.
        reason: String,
    },
    /// The body is not what its content type says.
    #[error("body: {reason}")]
    Body {
        /// What is wrong.
        reason: String,
    },
    /// An event format that Duet does not read; the right status is 415.
    #[error(
        "content type {content_type:?} is not supported; the formats are {STRUCTURED_CONTENT_TYPE} and {BATCH_CONTENT_TYPE}"
    )]
    Format {
        /// As given, shortened.
        content_type: String,
    },
    /// One event of a batch is not valid.
    #[error("event {index} of the batch: {error}")]
    InBatch {
        /// Its place, from 0.
        index: usize,
        /// What is wrong with it.
        error: Box<EnvelopeError>,
    },
}

impl EnvelopeError {
    pub(crate) fn invalid(attribute: &str, reason: impl Into<String>) -> Self {
        let attribute = attribute.chars().take(64).map(printable).collect();
        Self::Invalid { attribute, reason: reason.into() }
    }

    /// Name of the attribute that is wrong, where it is one attribute.
    #[must_use]
    pub fn attribute(&self) -> Option<&str> {
        match self {
            Self::Missing { attribute } => Some(attribute),
            Self::Invalid { attribute, .. } => Some(attribute),
            Self::InBatch { error, .. } => error.attribute(),
            Self::Body { .. } | Self::Format { .. } => None,
        }
    }

    /// The event format itself is not supported (415 rather than 400).
    #[must_use]
    pub fn is_unsupported_format(&self) -> bool {
        matches!(self, Self::Format { .. })
    }
}

/// Outside text, fit for a message.
fn printable(c: char) -> char {
    if c.is_control() { '\u{fffd}' } else { c }
}

#[cfg(test)]
mod tests;
