//! JSON objects as Go reads them, and so Dapr: the name of a member counts whatever its case. Dapr's SDKs rely on it: .NET
//! and Java say `pubsubName`, JavaScript says `entryID`. Imports nothing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapDeserializer;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// A struct, read from the text of a JSON object. Of members that differ by nothing but their case the last one counts;
/// those that the struct does not have take no memory.
#[derive(Debug)]
pub struct AnyCase<T>(
    /// What was read.
    pub T,
);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for AnyCase<T> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        T::deserialize(Folding(input)).map(Self)
    }
}

/// Learns from the struct which members it knows.
struct Folding<D>(D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Folding<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_any(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(Members { fields, visitor })
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Members<V> {
    fields: &'static [&'static str],
    visitor: V,
}

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de, V: Visitor<'de>> Visitor<'de> for Members<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<V::Value, A::Error> {
        let mut known: BTreeMap<&'static str, &'de RawValue> = BTreeMap::new();
        while let Some(Name(name)) = map.next_key::<Name<'de>>()? {
            match self.fields.iter().find(|field| field.eq_ignore_ascii_case(&name)) {
                Some(field) => {
                    known.insert(field, map.next_value()?);
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let known = MapDeserializer::<_, serde_json::Error>::new(known.into_iter());
        self.visitor.visit_map(known).map_err(A::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq, Eq)]
    #[serde(rename_all = "camelCase")]
    struct Thing<'a> {
        entry_id: Option<String>,
        #[serde(borrow)]
        event: Option<&'a str>,
    }

    #[test]
    fn the_last_member_of_a_name_counts_and_others_are_passed_over() {
        let read = |json: &'static str| {
            let AnyCase(thing) = serde_json::from_str::<AnyCase<Thing<'_>>>(json).unwrap();
            (thing.entry_id.unwrap_or_default(), thing.event.unwrap_or_default())
        };
        assert_eq!(read(r#"{"entryID":"a","EVENT":"e"}"#), ("a".to_owned(), "e"));
        assert_eq!(read(r#"{"entryid":"a","x":{"entryId":"b"},"entryId":"c"}"#).0, "c");
        assert_eq!(read(r#"{"entryId":null,"\u0045ntryId":"e"}"#).0, "e");
        assert_eq!(read("{}"), (String::new(), ""));
        for no_object in ["[]", "7", r#"["a","b"]"#, r#"{"entryId":7}"#, r#"{"entryId":"a""#] {
            assert!(serde_json::from_str::<AnyCase<Thing<'_>>>(no_object).is_err(), "{no_object}");
        }
    }
}
