//! Subscriptions and what protects topics.

use duet_api::resource::{AuthorizationPolicySpec, AuthorizationRule, Field, Subscription};
use duet_events::bus::SubscriptionSpec;

use super::Lint;
use crate::compile::events::subscription;
use crate::expression::Selector;

/// Longest name of a topic, as on the bus.
pub(super) const MAX_NAME_BYTES: usize = 255;

impl Lint<'_> {
    pub(super) fn subscription(&mut self, resource: &Subscription) {
        let spec = match SubscriptionSpec::try_from(subscription(resource)) {
            Ok(spec) => spec,
            Err(error) => {
                self.path.extend(error.field.split('.').map(Field::Name));
                return self.error(format!("{} {}", error.field, error.reason));
            }
        };
        if let Err(error) = Selector::of(&spec) {
            match error.route {
                None => self.path.push(Field::Name("filter")),
                Some(number) => self.path.extend([
                    Field::Name("routes"),
                    Field::Index(number),
                    Field::Name("match"),
                ]),
            }
            self.error(format!("{:?} {}", error.source_text, error.reason));
            self.path.truncate(1);
        }
        let subscriber = &resource.spec.subscriber;
        if subscriber.path.is_empty() && spec.routes.is_empty() {
            self.path.extend([Field::Name("subscriber"), Field::Name("path")]);
            self.error("a path is needed, or routes that have one".to_owned());
            self.path.truncate(1);
        }
        if spec.broadcast && spec.start != duet_events::bus::Start::Latest {
            let text = "every replica of a broadcast starts with what is published while it runs";
            self.at("start", |lint| lint.error(text.to_owned()));
        }
    }

    pub(super) fn authorization_policy(&mut self, spec: &AuthorizationPolicySpec) {
        if spec.target_refs.is_empty() {
            let text = "a policy without a target protects nothing";
            self.at("targetRefs", |lint| lint.error(text.to_owned()));
        }
        self.each("targetRefs", &spec.target_refs, |lint, target| {
            if let Some(group) = target.group.as_ref().filter(|group| *group != "duet.dev") {
                let text = format!("Topic is not of the group {group:?}");
                lint.at("group", |lint| lint.error(text));
            }
            let name = &target.name;
            let bad = name.is_empty()
                || name.len() > MAX_NAME_BYTES
                || name.contains(|c: char| c.is_control() || c.is_whitespace());
            if bad {
                lint.at("name", |lint| lint.error(format!("{name:?} cannot be a topic's name")));
            } else if name.contains('*') {
                let text = format!("{name:?}: a policy names each topic that it protects");
                lint.at("name", |lint| lint.error(text));
            }
        });
        self.each("rules", &spec.rules, Lint::authorization_rule);
    }

    fn authorization_rule(&mut self, rule: &AuthorizationRule) {
        self.each("from", &rule.from, |lint, from| {
            if from.identities.is_empty() && from.namespaces.is_empty() {
                lint.error("identities or namespaces are needed".to_owned());
            }
            lint.each("identities", &from.identities, |lint, id| {
                let spiffe = id.starts_with("spiffe://") || id == "*";
                if !spiffe {
                    lint.error(format!(
                        "{id:?} is not a SPIFFE id such as spiffe://duet.local/ns/shop/sa/orders"
                    ));
                }
                lint.pattern_end(id);
            });
            lint.each("namespaces", &from.namespaces, |lint, name| lint.pattern_end(name));
        });
    }

    /// A star stands for any rest, so it comes last.
    fn pattern_end(&mut self, pattern: &str) {
        if pattern.is_empty() {
            self.error("is empty".to_owned());
        } else if pattern.strip_suffix('*').unwrap_or(pattern).contains('*') {
            self.error(format!("{pattern:?}: a '*' stands at the end only"));
        }
    }
}
