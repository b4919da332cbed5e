//! An event's data as a value.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;

use cel::common::types::{
    CelBool, CelBytes, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelString, CelUInt,
};
use cel::common::value::Val;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Larger data is not parsed, and looking at it is an error.
const MAX_BYTES: usize = 1 << 20;
/// Nor is JSON with more values than these: objects, their members, items, and the rest.
const MAX_VALUES: usize = 50_000;

type Boxed<'v> = Box<dyn Val + 'v>;

/// JSON as what it says, other text as a string, the rest as bytes. None of data that is too large.
pub(super) fn value<'v>(content_type: Option<&str>, bytes: &'v [u8]) -> Option<Boxed<'v>> {
    if bytes.len() > MAX_BYTES {
        return None;
    }
    if is_json(content_type) {
        let left = Cell::new(MAX_VALUES);
        let mut reader = serde_json::Deserializer::from_slice(bytes);
        let read = Values(&left).deserialize(&mut reader);
        match read.and_then(|value| reader.end().map(|()| value)) {
            Ok(value) => return Some(value),
            Err(_) if left.get() == 0 => return None,
            Err(_) => {}
        }
    }
    Some(match std::str::from_utf8(bytes) {
        Ok(text) => Box::new(CelString::from(text)),
        Err(_) => Box::new(CelBytes::from(bytes)),
    })
}

/// Data without a content type is JSON (CloudEvents JSON format, section 3.1).
fn is_json(content_type: Option<&str>) -> bool {
    let Some(content_type) = content_type else {
        return true;
    };
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence.split_once('/').is_some_and(|(_, sub)| sub == "json" || sub.ends_with("+json"))
}

/// Reads one value, while there are any left.
#[derive(Clone, Copy)]
struct Values<'a>(&'a Cell<usize>);

impl Values<'_> {
    fn one<E: Error>(self) -> Result<(), E> {
        let left = self.0.get().checked_sub(1).ok_or_else(|| E::custom("too many values"))?;
        self.0.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Values<'_> {
    type Value = Boxed<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Boxed<'de>, D::Error> {
        self.one()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Values<'_> {
    type Value = Boxed<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Boxed<'de>, E> {
        Ok(Box::new(CelNull))
    }

    fn visit_bool<E>(self, yes: bool) -> Result<Boxed<'de>, E> {
        Ok(Box::new(CelBool::from(yes)))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Boxed<'de>, E> {
        Ok(Box::new(CelInt::from(number)))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Boxed<'de>, E> {
        Ok(match i64::try_from(number) {
            Ok(number) => Box::new(CelInt::from(number)),
            Err(_) => Box::new(CelUInt::from(number)),
        })
    }

    fn visit_f64<E>(self, number: f64) -> Result<Boxed<'de>, E> {
        Ok(Box::new(CelDouble::from(number)))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Boxed<'de>, E> {
        Ok(Box::new(CelString::from(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Boxed<'de>, E> {
        Ok(Box::new(CelString::from(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Boxed<'de>, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Box::new(CelList::from(list)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Boxed<'de>, A::Error> {
        let mut map = HashMap::new();
        while let Some(name) = members.next_key::<String>()? {
            self.one()?;
            map.insert(CelMapKey::from(name), members.next_value_seed(self)?);
        }
        Ok(Box::new(CelMap::from(map)))
    }
}
