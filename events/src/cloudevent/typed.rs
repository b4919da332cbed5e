//! Attributes that are numbers or booleans.
//!
//! Every attribute is kept as text, which headers, order keys and schedules take. Which of them the JSON format has without
//! quotes is noted beside, by name: most events have none, and an empty set takes no memory. A number stays as it was
//! written, also one that `CloudEvents` has no type for (a fraction, or more than 32 bits): Dapr passes such numbers on.

use serde::ser::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::{EnvelopeError, Event, attribute};

/// What the value of an attribute is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttributeValue<'a> {
    /// Text, as nearly all are.
    String(&'a str),
    /// True or false.
    Boolean(bool),
    /// A number as JSON writes it, of any size and precision.
    Number(&'a str),
}

impl Serialize for AttributeValue<'_> {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::String(text) => output.serialize_str(text),
            Self::Boolean(yes) => output.serialize_bool(*yes),
            Self::Number(json) => match serde_json::from_str::<&RawValue>(json) {
                Ok(number) => number.serialize(output),
                Err(_not_json) => output.serialize_str(json),
            },
        }
    }
}

impl Event {
    /// All attributes except `id`, `source`, `type` and `specversion`, each as what it is.
    pub fn values(&self) -> impl Iterator<Item = (&str, AttributeValue<'_>)> {
        self.attributes.iter().map(|(name, text)| (name.as_str(), self.value(name, text)))
    }

    fn value<'a>(&self, name: &str, text: &'a str) -> AttributeValue<'a> {
        if !self.typed.contains(name) {
            return AttributeValue::String(text);
        }
        match text {
            "true" => AttributeValue::Boolean(true),
            "false" => AttributeValue::Boolean(false),
            number => AttributeValue::Number(number),
        }
    }

    /// With one more attribute, given as a number or boolean of JSON; replaces an older value. One that `CloudEvents`
    /// itself has as a string becomes a string.
    ///
    /// # Errors
    /// When `json` is neither, or when the name is not valid, or that of a required attribute or of the data.
    pub fn with_literal(mut self, name: &str, json: &str) -> Result<Self, EnvelopeError> {
        self.set_literal(name, json)?;
        Ok(self)
    }

    pub(super) fn set_literal(&mut self, name: &str, json: &str) -> Result<(), EnvelopeError> {
        if !is_literal(json) {
            let reason = "is not a string, a number or a boolean";
            return Err(EnvelopeError::invalid(name, reason));
        }
        self.set_attribute(name, json.to_owned())?;
        if !attribute::STRINGS.contains(&name) {
            self.typed.insert(name.to_owned());
        }
        Ok(())
    }

    /// The names of the attributes that are numbers or booleans, for [`Event::note_typed`]. Empty for none.
    pub(crate) fn typed_names(&self) -> String {
        let mut names = String::new();
        for name in &self.typed {
            if !names.is_empty() {
                names.push(',');
            }
            names.push_str(name);
        }
        names
    }

    /// Notes which attributes are numbers or booleans. Comes from another process, or from before somebody changed the
    /// attributes: a name whose attribute is gone, or is text, says nothing.
    pub(crate) fn note_typed(&mut self, names: &str) {
        if names.is_empty() {
            return;
        }
        // There cannot be more of them than attributes.
        for name in names.split(',').take(self.attributes.len()) {
            let literal = self.attributes.get(name).is_some_and(|text| is_literal(text));
            if literal && !attribute::STRINGS.contains(&name) {
                self.typed.insert(name.to_owned());
            }
        }
    }
}

/// Whether a text is a number or boolean of JSON, and nothing else.
fn is_literal(text: &str) -> bool {
    match text.as_bytes() {
        b"true" | b"false" => true,
        [b'-' | b'0'..=b'9', ..] => {
            let number = serde_json::from_str::<&RawValue>(text);
            number.is_ok_and(|number| number.get().len() == text.len())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use duet_api::proto;

    use super::*;

    fn event() -> Event {
        let event = Event::new("1", "/s", "t").unwrap().with_attribute("tenant", "5").unwrap();
        event.with_literal("priority", "5").unwrap().with_literal("urgent", "true").unwrap()
    }

    #[test]
    fn literals_are_numbers_and_booleans_of_json_alone() {
        for text in ["true", "false", "0", "-0", "5", "-7", "1.50", "1E400", "18446744073709551616"]
        {
            assert!(is_literal(text), "{text}");
        }
        for text in [
            "", " ", "True", "null", "\"5\"", "05", "+5", "5 ", " 5", "5\n", "1.", ".5", "1e", "-",
            "0x5", "5,6", "5 6", "NaN", "[5]", "{}",
        ] {
            assert!(!is_literal(text), "{text:?}");
            let error = Event::new("1", "/s", "t").unwrap().with_literal("x", text).unwrap_err();
            assert_eq!(error.attribute(), Some("x"), "{text:?}");
        }
    }

    #[test]
    fn an_attribute_is_what_it_was_set_to_last() {
        let set = event();
        let values: Vec<_> = set.values().map(|(_, value)| value).collect();
        let expected = [
            AttributeValue::Number("5"),
            AttributeValue::String("5"),
            AttributeValue::Boolean(true),
        ];
        assert_eq!(values, expected);
        let text = event().with_attribute("priority", "7").unwrap();
        assert_eq!(text.values().next(), Some(("priority", AttributeValue::String("7"))));
        assert_eq!(text.with_literal("priority", "5").unwrap(), event());
        let mut gone = event();
        gone.remove_attribute("priority");
        let back = gone.with_attribute("priority", "5").unwrap();
        assert_eq!(back.values().next(), Some(("priority", AttributeValue::String("5"))));
        let at = "2026-01-31T12:00:00Z".parse().unwrap();
        let later = event().with_literal("deliverat", "7").unwrap().delayed(at);
        assert_eq!(later.typed_names(), "priority,urgent");
        let core = Event::new("1", "/s", "t").unwrap().with_literal("subject", "5").unwrap();
        assert_eq!(core.values().next(), Some(("subject", AttributeValue::String("5"))));
    }

    #[test]
    fn types_survive_the_wire_and_a_peer_that_does_not_know_them() {
        let raw = proto::Event::from(event());
        assert_eq!(raw.typed, "priority,urgent");
        assert_eq!(Event::try_from(raw.clone()), Ok(event()));
        let older = proto::Event { typed: String::new(), ..raw };
        let strings = Event::try_from(older).unwrap();
        assert!(strings.values().all(|(_, value)| matches!(value, AttributeValue::String(_))));
        assert_eq!(strings.attributes(), event().attributes());
        // It costs those that have none nothing.
        assert_eq!(proto::Event::from(strings).typed.capacity(), 0);
    }

    #[test]
    fn names_that_say_nothing_are_left_out() {
        let raw = proto::Event::from(event().with_attribute("subject", "5").unwrap());
        for typed in ["tenants", "subject", "id", "data", "", ",", "priority ", "Priority"] {
            let event = Event::try_from(proto::Event { typed: typed.to_owned(), ..raw.clone() });
            assert_eq!(event.unwrap().typed_names(), "", "{typed:?}");
        }
        let mut changed = raw;
        changed.attributes.insert("priority".to_owned(), "high".to_owned());
        changed.attributes.remove("urgent");
        assert_eq!(Event::try_from(changed).unwrap().typed_names(), "");
    }
}
