//! W3C trace context, which is headers of a request and attributes of an event.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{Event, attribute};

/// The headers, each with its longest value: of a batch each event gets a copy, and an application has room for few
/// kilobytes of headers. What W3C says that has to be carried on has room.
const BOUNDS: [(HeaderName, usize); 2] =
    [(HeaderName::from_static("traceparent"), 64), (HeaderName::from_static("tracestate"), 512)];

impl Event {
    /// Takes over the trace context of the request that it came with, where it has none of its own. What cannot be an
    /// attribute, or is longer than anybody has to carry, is no reason to refuse the event.
    pub fn fill_trace(&mut self, headers: &HeaderMap) {
        if self.attribute("traceparent").is_some() {
            return;
        }
        for (header, longest) in BOUNDS {
            let name = header.as_str();
            let value = headers.get(&header).filter(|value| value.len() <= longest);
            let value = value.and_then(|value| value.to_str().ok());
            let Some(value) = value.filter(|value| attribute::check(name, value).is_ok()) else {
                // A state says nothing without its parent, which comes first.
                return;
            };
            self.put(name, value.to_owned());
        }
    }

    /// Its trace context for the headers of a delivery. What cannot be a header, or is longer than anybody has to carry, is
    /// left out: it must not cost the event.
    pub fn trace_headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> + '_ {
        BOUNDS.into_iter().map_while(|(name, longest)| {
            let value = self.attribute(name.as_str()).filter(|value| value.len() <= longest)?;
            Some((name, HeaderValue::from_str(value).ok()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_context_that_is_too_long_is_no_header_of_a_delivery() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let sent = |parent: &str, state: &str| {
            let event = Event::new("1", "/s", "t").unwrap();
            let event = event.with_attribute("traceparent", parent).unwrap();
            let event = event.with_attribute("tracestate", state).unwrap();
            event.trace_headers().map(|(name, value)| (name.to_string(), value.len())).collect()
        };
        let expected = |sizes: &[(&str, usize)]| -> Vec<(String, usize)> {
            sizes.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect()
        };
        let (longest, longer) = ("s".repeat(512), "s".repeat(513));
        let sent = |parent, state| -> Vec<(String, usize)> { sent(parent, state) };
        assert_eq!(sent(parent, &longest), expected(&[("traceparent", 55), ("tracestate", 512)]));
        assert_eq!(sent(parent, &longer), expected(&[("traceparent", 55)]));
        assert_eq!(sent(parent, "\u{e4}"), expected(&[("traceparent", 55), ("tracestate", 2)]));
        assert_eq!(sent(&longer, "a=b"), expected(&[]), "a state says nothing without its parent");
    }
}
