//! The members of a JSON envelope, as they are written.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;

/// Room for the members that most envelopes have.
const USUAL_MEMBERS: usize = 12;

/// The members of a JSON envelope by name, each once, without those that are null: null means absent.
pub(super) struct Members<'a>(pub(super) Vec<(Name<'a>, &'a RawValue)>);

#[derive(Deserialize)]
pub(super) struct Name<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

impl Members<'_> {
    pub(super) fn get(&self, name: &str) -> Option<&RawValue> {
        let found = self.0.binary_search_by(|(Name(other), _)| (**other).cmp(name));
        found.ok().and_then(|at| self.0.get(at)).map(|(_, raw)| *raw)
    }
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(USUAL_MEMBERS);
                while let Some(member) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    members.push(member);
                }
                members.sort_unstable_by(|(Name(one), _), (Name(other), _)| one.cmp(other));
                for pair in members.windows(2) {
                    if let [(Name(one), _), (Name(other), _)] = pair
                        && one == other
                    {
                        let name: String = one.chars().take(64).collect();
                        let message = format!("member {name:?} is given twice");
                        return Err(serde::de::Error::custom(message));
                    }
                }
                members.retain(|(_name, raw)| raw.get() != "null");
                Ok(Members(members))
            }
        }

        input.deserialize_map(Collect)
    }
}

/// The text of a JSON string; none for any other value, and for half a surrogate pair.
pub(super) fn string(raw: &RawValue) -> Option<Cow<'_, str>> {
    let json = raw.get();
    let inner = json.strip_prefix('"')?.strip_suffix('"')?;
    // It is known to be a JSON string: without escapes, it is what it says.
    if inner.contains('\\') {
        return serde_json::from_str(json).map(Cow::Owned).ok();
    }
    Some(Cow::Borrowed(inner))
}
