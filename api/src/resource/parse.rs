//! Reads YAML files into [`Resource`]s, and says where what is wrong stands.

mod dapr;

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::{API_VERSION, GROUP, Resource};

/// Where a resource was read: a file, and the text of its document there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file, as the reader was given it.
    pub file: Arc<str>,
    /// First line of the document, from 1.
    pub line: usize,
    text: Arc<str>,
}

/// One step of a path to a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// Of a mapping.
    Name(&'static str),
    /// Of a sequence, from 0.
    Index(usize),
}

/// A resource with its origin.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// What was read.
    pub resource: Resource,
    /// Where.
    pub origin: Origin,
}

/// Something wrong in a file. Displays as `file:line:column: field: message`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ParseError {
    /// The file.
    pub file: Arc<str>,
    /// From 1.
    pub line: usize,
    /// From 1.
    pub column: usize,
    /// Path of the field, such as `spec.timeouts.request`; empty where there is none.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// What a file holds: everything that is good, everything that is wrong, and what is there in vain.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    /// The resources, in order.
    pub resources: Vec<Located>,
    /// In order.
    pub errors: Vec<ParseError>,
    /// Of documents that mean something to Dapr and nothing here, in order.
    pub warnings: Vec<ParseError>,
}

/// Parses a multi-document YAML text. Documents of kinds that are not ours to read (`Deployment`, …) are
/// passed over, so that a folder of manifests can be read as it is; empty documents too. Dapr's are passed over with a
/// warning.
#[must_use]
pub fn parse(file: &str, text: &str) -> Parsed {
    let file: Arc<str> = file.into();
    let mut parsed = Parsed::default();
    for (line, document) in documents(text) {
        let origin = Origin { file: Arc::clone(&file), line, text: document.into() };
        match parse_document(&origin, &mut parsed.warnings) {
            Ok(Some(resource)) => parsed.resources.push(Located { resource, origin }),
            Ok(None) => {}
            Err(error) => parsed.errors.push(error),
        }
    }
    parsed
}

/// Splits at `---` and `...` lines, which YAML allows at column 0 for nothing else (YAML 1.2, 9.1).
fn documents(text: &str) -> Vec<(usize, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut found = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let end = offset + line.len();
        let marker = line.trim_end();
        if marker == "---" || marker == "..." || line.starts_with("--- ") {
            found.push((start_line, text.get(start..offset).unwrap_or_default()));
            // Keep the rest of a line such as `--- # comment` or `--- {a: b}`, so that columns stay right.
            let keeps = line.starts_with("--- ");
            start = if keeps { offset } else { end };
            start_line = if keeps { number + 1 } else { number + 2 };
        }
        offset = end;
    }
    found.push((start_line, text.get(start..).unwrap_or_default()));
    found.retain(|(_, document)| document.lines().any(|line| !is_blank(line)));
    found
}

fn is_blank(line: &str) -> bool {
    let line = line.strip_prefix("---").unwrap_or(line).trim();
    line.is_empty() || line.starts_with('#')
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: String,
}

fn parse_document(
    origin: &Origin,
    warnings: &mut Vec<ParseError>,
) -> Result<Option<Resource>, ParseError> {
    let head: Head = read(origin)?;
    let (group, _version) = head.api_version.split_once('/').unwrap_or(("", &head.api_version));
    let resource = match (group, head.kind.as_str()) {
        ("", "Service") => Resource::Service(read(origin)?),
        ("discovery.k8s.io", "EndpointSlice") => Resource::EndpointSlice(read(origin)?),
        ("gateway.networking.k8s.io", "HTTPRoute") => Resource::HttpRoute(read(origin)?),
        ("gateway.networking.k8s.io", "GRPCRoute") => Resource::GrpcRoute(read(origin)?),
        ("gateway.networking.k8s.io", "ReferenceGrant") => Resource::ReferenceGrant(read(origin)?),
        ("gateway.networking.x-k8s.io", "XBackendTrafficPolicy") => {
            Resource::BackendPolicy(read(origin)?)
        }
        (GROUP, _) if head.api_version != API_VERSION => {
            let message = format!("unknown version {:?}; it is {API_VERSION}", head.api_version);
            return Err(origin.error(&[Field::Name("apiVersion")], message));
        }
        (GROUP, "TrafficPolicy") => Resource::TrafficPolicy(read(origin)?),
        (GROUP, "EventBus") => Resource::EventBus(read(origin)?),
        (GROUP, "Topic") => Resource::Topic(read(origin)?),
        (GROUP, "Subscription") => Resource::Subscription(read(origin)?),
        (GROUP, "OutboxSource") => Resource::OutboxSource(Box::new(read(origin)?)),
        (GROUP, "AuthorizationPolicy") => Resource::AuthorizationPolicy(read(origin)?),
        (GROUP, kind) => {
            let message = format!(
                "unknown kind {kind:?} in {GROUP}; known are TrafficPolicy, EventBus, Topic, \
                 Subscription, OutboxSource and AuthorizationPolicy"
            );
            return Err(origin.error(&[Field::Name("kind")], message));
        }
        (dapr::GROUP, kind) => {
            warnings.push(dapr::instead(origin, kind));
            return Ok(None);
        }
        _ => return Ok(None),
    };
    Ok(Some(resource))
}

fn read<T: DeserializeOwned>(origin: &Origin) -> Result<T, ParseError> {
    let yaml = serde_yaml::Deserializer::from_str(&origin.text);
    serde_path_to_error::deserialize(yaml).map_err(|error| {
        let field = error.path().to_string();
        let inner = error.into_inner();
        let place = inner.location().map_or((1, 1), |at| (at.line(), at.column()));
        origin.at(place, if field == "." { String::new() } else { field }, &strip_place(&inner))
    })
}

/// `serde_yaml` appends ` at line X column Y` (of the document) and prepends the path; we give both ourselves.
fn strip_place(error: &serde_yaml::Error) -> String {
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or(&text);
    match text.split_once(": ") {
        Some((path, rest)) if !path.contains(' ') && path.contains('.') => rest.to_owned(),
        Some(("metadata" | "spec" | "kind" | "apiVersion", rest)) => rest.to_owned(),
        _ => text.to_owned(),
    }
}

impl Origin {
    /// An error at a field of this document, for what only shows when all resources are seen together.
    #[must_use]
    pub fn error(&self, path: &[Field], message: impl Into<String>) -> ParseError {
        let place = locate(&self.text, path).unwrap_or((1, 1));
        let mut field = String::new();
        for step in path {
            match step {
                Field::Name(name) if field.is_empty() => field.push_str(name),
                Field::Name(name) => field.extend([".", name]),
                Field::Index(index) => field.push_str(&format!("[{index}]")),
            }
        }
        self.at(place, field, &message.into())
    }

    /// The line in the file of a field's value; of its nearest existing parent where the field is absent.
    #[must_use]
    pub fn line_of(&self, path: &[Field]) -> usize {
        let (line, _) = locate(&self.text, path).unwrap_or((1, 1));
        self.line + line - 1
    }

    fn at(&self, (line, column): (usize, usize), field: String, message: &str) -> ParseError {
        let file = Arc::clone(&self.file);
        ParseError { file, line: self.line + line - 1, column, field, message: message.to_owned() }
    }
}

/// Line and column of a field's value in a document, from 1; of its nearest existing parent where the field
/// is absent. Walks the document with serde and fails on purpose at the field: the YAML reader then tells
/// where it was.
fn locate(text: &str, path: &[Field]) -> Option<(usize, usize)> {
    (0..=path.len()).rev().find_map(|length| {
        let walk = Walk(path.get(..length)?);
        let error = walk.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
        if !error.to_string().contains(FOUND) {
            return None;
        }
        error.location().map(|at| (at.line(), at.column()))
    })
}

const FOUND: &str = "duet: found the field";

struct Walk<'p>(&'p [Field]);

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_any(self)
    }
}

impl Walk<'_> {
    fn here<E: serde::de::Error>(&self) -> Result<(), E> {
        if self.0.is_empty() { Err(E::custom(FOUND)) } else { Ok(()) }
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.here()?;
        while let Some(key) = map.next_key::<String>()? {
            match self.0.split_first() {
                Some((Field::Name(name), rest)) if *name == key => {
                    map.next_value_seed(Walk(rest))?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        self.here()?;
        let Some((Field::Index(wanted), rest)) = self.0.split_first() else {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        for _ in 0..*wanted {
            if seq.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        seq.next_element_seed(Walk(rest))?;
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.here()
    }
    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.here()
    }
    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
        self.here()
    }
    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.here()
    }
    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
        self.here()
    }
    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.here()
    }
    fn visit_none<E: serde::de::Error>(self) -> Result<(), E> {
        self.here()
    }
}

#[cfg(test)]
mod tests;
