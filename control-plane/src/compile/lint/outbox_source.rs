//! Tables that are relayed.

use duet_api::resource::{Field, OutboxSource};
use duet_events::Event;

use super::Lint;
use super::events::MAX_NAME_BYTES;

impl Lint<'_> {
    pub(super) fn outbox_source(&mut self, resource: &OutboxSource) {
        let spec = &resource.spec;
        if let Some(topic) = &spec.topic {
            let odd = |c: char| c.is_control() || c.is_whitespace();
            if topic.len() > MAX_NAME_BYTES || topic.contains(odd) {
                let text = format!("{topic:?} cannot be a topic's name");
                self.at("topic", |lint| lint.error(text));
            } else if spec.columns.topic.is_some() {
                self.path.extend([Field::Name("columns"), Field::Name("topic")]);
                self.error("the topic is given already, for every row".to_owned());
                self.path.truncate(1);
            }
        }
        // An event with these attributes says whether they are valid.
        let source = spec.source.as_deref().unwrap_or("/");
        let attributes = [
            ("source", Event::new("1", source, "t").map(drop)),
            ("type", Event::new("1", "/", spec.event_type.as_deref().unwrap_or("t")).map(drop)),
            ("dataContentType", content_type(spec.data_content_type.as_deref())),
        ];
        for (field, result) in attributes {
            if let Err(error) = result {
                self.at(field, |lint| lint.error(error.to_string()));
            }
        }
    }
}

fn content_type(value: Option<&str>) -> Result<(), duet_events::cloudevent::EnvelopeError> {
    let Some(value) = value else { return Ok(()) };
    Event::new("1", "/", "t")?.with_attribute("datacontenttype", value).map(drop)
}
