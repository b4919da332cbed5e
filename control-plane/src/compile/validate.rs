//! What is wrong between resources: references that lead nowhere, policies that contend for one target, and rules that
//! others shadow. What is found here breaks only itself; everything else applies.

mod route;

use duet_api::resource::{
    EventBus, Field, FilterType, HttpRule, Located, Metadata, ObjectKey, OutboxSource, ParseError,
    Resource, Subscription, TargetKind, TargetRef, Topic, TrafficPolicy, XBackendTrafficPolicy,
};

use super::fields::Scope;
use super::{clusters, events, fields, policy, shadow};
use crate::index::{Index, SERVICE_NAME_LABEL, ServiceKey, object, target_object};

/// What was found, in the order of files and lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What does not work.
    pub errors: Vec<ParseError>,
    /// Services that nobody knows: they do not work either, until a replica registers.
    pub unregistered: Vec<ParseError>,
    /// What works, but hardly as meant.
    pub warnings: Vec<ParseError>,
}

/// Checks every reference of every resource.
#[must_use]
pub fn validate(index: &Index) -> Findings {
    let mut findings = Findings::default();
    for (_, located) in index.resources() {
        let mut check = Check { index, located, findings: &mut findings };
        match &located.resource {
            Resource::HttpRoute(route) => {
                let redirects = |rule: &HttpRule| {
                    rule.filters.iter().any(|filter| filter.kind == FilterType::RequestRedirect)
                };
                let rules = route.spec.rules.iter();
                let rules = rules.map(|rule| (rule.backend_refs.as_slice(), redirects(rule)));
                check.route(&route.spec.parent_refs, rules.collect(), &route.metadata);
                for (number, rule) in route.spec.rules.iter().enumerate() {
                    check.filters(&rule.filters, number, &route.metadata);
                }
            }
            Resource::GrpcRoute(route) => {
                let rules = route.spec.rules.iter();
                let rules = rules.map(|rule| (rule.backend_refs.as_slice(), false));
                check.route(&route.spec.parent_refs, rules.collect(), &route.metadata);
                for (number, rule) in route.spec.rules.iter().enumerate() {
                    check.filters(&rule.filters, number, &route.metadata);
                }
            }
            Resource::BackendPolicy(policy) => check.backend_policy(policy),
            Resource::TrafficPolicy(policy) => check.policy(policy),
            Resource::Subscription(subscription) => check.subscription(subscription),
            Resource::OutboxSource(source) => check.outbox_source(source),
            Resource::Topic(topic) => check.topic(topic),
            Resource::EventBus(bus) => check.event_bus(bus),
            Resource::EndpointSlice(slice) => check.slice(&slice.metadata),
            Resource::Service(_)
            | Resource::ReferenceGrant(_)
            | Resource::AuthorizationPolicy(_) => {}
        }
    }
    findings.warnings.extend(shadow::warnings(index));
    for list in [&mut findings.errors, &mut findings.unregistered, &mut findings.warnings] {
        list.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    }
    findings
}

struct Check<'c> {
    index: &'c Index,
    located: &'c Located,
    findings: &'c mut Findings,
}

impl Check<'_> {
    fn error(&mut self, path: &[Field], message: String) {
        self.findings.errors.push(self.located.origin.error(path, message));
    }

    fn warning(&mut self, path: &[Field], message: String) {
        self.findings.warnings.push(self.located.origin.error(path, message));
    }

    /// Whether the service that is named there exists; says so otherwise.
    fn service(&mut self, path: &[Field], key: &ServiceKey) -> bool {
        let known = self.index.knows_service(key);
        if !known {
            let text = format!(
                "no service {:?} in namespace {:?}: no Service resource declares it and no replica has registered",
                key.name, key.namespace
            );
            self.findings.unregistered.push(self.located.origin.error(path, text));
        }
        known
    }

    /// Nothing where the name is empty: a port without a name has to be named by its number.
    fn ports_named(&self, key: &ServiceKey, name: &str) -> Vec<u16> {
        let ports = self.index.service(key).into_iter().flat_map(|service| &service.spec.ports);
        let named = ports.filter(|port| !name.is_empty() && port.name == name);
        named.map(|port| port.port).collect()
    }

    fn backend_policy(&mut self, policy: &XBackendTrafficPolicy) {
        for (number, target) in policy.spec.target_refs.iter().enumerate() {
            let at = |field| spec(&[("targetRefs", Some(number)), (field, None)]);
            if target.kind != "Service" || !matches!(target.group.as_str(), "" | "core") {
                let text = format!("targets of kind {:?} are not supported", target.kind);
                self.error(&at("kind"), text);
                continue;
            }
            let service = ServiceKey::new(&policy.metadata.namespace, &target.name);
            if self.service(&at("name"), &service)
                && let Some((_, counts)) = policy::standard(self.index, &service.object())
            {
                self.contends(&at("name"), &service.object(), counts);
            }
        }
    }

    /// Of several policies on one target one counts.
    fn contends(&mut self, path: &[Field], target: &ObjectKey, counts: &Located) {
        let key = counts.resource.key();
        if key == self.located.resource.key() {
            return;
        }
        let (name, origin) = (&key.name, &counts.origin);
        let place = format!("{}:{}", origin.file, origin.line_of(&[Field::Name("metadata")]));
        let why = format!(
            "{target} has the {} {name:?} already ({place}); this one is ignored",
            key.kind
        );
        self.error(path, why);
    }

    fn policy(&mut self, policy: &TrafficPolicy) {
        let key = object("TrafficPolicy", &policy.metadata.namespace, &policy.metadata.name);
        if policy.spec.target_refs.is_empty() && self.index.referrers(&key).next().is_none() {
            let text = "the policy has no targetRefs and no route's ExtensionRef names it";
            self.warning(&spec(&[("targetRefs", None)]), text.to_owned());
        }
        for (number, target) in policy.spec.target_refs.iter().enumerate() {
            let at = |field| spec(&[("targetRefs", Some(number)), (field, None)]);
            if let Some(group) = &target.group
                && !group_fits(group, target.kind)
            {
                let kind = target.kind.name();
                self.error(&at("group"), format!("{kind} is not of the group {group:?}"));
                continue;
            }
            let namespace = &policy.metadata.namespace;
            let key = target_object(target.kind, namespace, &target.name);
            if target.kind == TargetKind::Service
                && !self.service(&at("name"), &ServiceKey::new(namespace, &target.name))
            {
                continue;
            }
            if let Err((field, why)) = self.target(target, &key) {
                self.error(&at(field), why);
                continue;
            }
            let counts = policy::first_policy(self.index, &key, target.section_name.as_deref());
            if let Some(counts) = counts {
                self.contends(&at("name"), &key, counts.located);
            }
            self.route_ignores(policy, target);
        }
    }

    /// Of a service that exists, or of a route.
    fn target(&self, target: &TargetRef, key: &ObjectKey) -> Result<(), (&'static str, String)> {
        let section = target.section_name.as_deref();
        if target.kind == TargetKind::Service {
            let service = ServiceKey::new(&key.namespace, &key.name);
            return match section.filter(|name| self.ports_named(&service, name).is_empty()) {
                Some(name) => {
                    Err(("sectionName", format!("service {service} has no port named {name:?}")))
                }
                None => Ok(()),
            };
        }
        let Some(route) = self.index.get(key) else {
            return Err(("name", format!("there is no {key}")));
        };
        let has_rule =
            |section: &str| !section.is_empty() && rule_names(&route.resource).contains(&section);
        match section.filter(|section| !has_rule(section)) {
            Some(name) => Err(("sectionName", format!("{key} has no rule named {name:?}"))),
            None => Ok(()),
        }
    }

    /// Connections and the budget belong to services as a whole.
    fn route_ignores(&mut self, policy: &TrafficPolicy, target: &TargetRef) {
        if target.kind == TargetKind::Service {
            return;
        }
        let given = |field: &fields::Field| (field.of)(&policy.spec).is_some();
        let of_service = fields::fields().into_iter().filter(|field| field.scope != Scope::Rule);
        for field in of_service.filter(given) {
            let path: Vec<Field> = [Field::Name("spec")].into_iter().chain(field.steps()).collect();
            let text = format!("{} counts on a Service only, not on a route", field.name);
            self.warning(&path, text);
        }
    }

    fn bus(&mut self, name: &str) -> bool {
        let known = events::knows_bus(self.index, name);
        if !known {
            self.error(&spec(&[("bus", None)]), format!("there is no EventBus {name:?}"));
        }
        known
    }

    fn subscription(&mut self, subscription: &Subscription) {
        let spec_of = &subscription.spec;
        let service = &spec_of.subscriber.service;
        let key = ServiceKey::new(&subscription.metadata.namespace, service);
        self.service(&spec(&[("subscriber", None), ("service", None)]), &key);
        if !self.bus(&spec_of.bus) {
            return;
        }
        if let Err(why) = events::takes_topic(self.index, &spec_of.bus, &spec_of.topic) {
            self.error(&spec(&[("topic", None)]), why);
        }
    }

    fn outbox_source(&mut self, source: &OutboxSource) {
        let spec_of = &source.spec;
        let key = ServiceKey::new(&source.metadata.namespace, &spec_of.service);
        self.service(&spec(&[("service", None)]), &key);
        if self.bus(&spec_of.bus)
            && let Some(topic) = &spec_of.topic
            && let Err(why) = events::takes_topic(self.index, &spec_of.bus, topic)
        {
            self.error(&spec(&[("topic", None)]), why);
        }
    }

    fn event_bus(&mut self, bus: &EventBus) {
        if let Some(rival) = clusters::rival(self.index, bus) {
            let path = spec(&[("backend", None), ("nats", None), ("servers", None)]);
            let why = clusters::taken(&rival.resource.metadata().name);
            self.error(&path, why);
        }
    }

    fn topic(&mut self, topic: &Topic) {
        self.bus(&topic.spec.bus);
    }

    fn slice(&mut self, metadata: &Metadata) {
        let path = [Field::Name("metadata"), Field::Name("labels")];
        let Some(name) = metadata.labels.get(SERVICE_NAME_LABEL) else {
            let why = format!("the label {SERVICE_NAME_LABEL} must name the service");
            return self.error(&path, why);
        };
        let key = ServiceKey::new(&metadata.namespace, name);
        if self.index.service(&key).is_none() {
            self.warning(&path, format!("no Service resource declares {key}"));
        }
    }
}

/// Names of a route's rules.
fn rule_names(route: &Resource) -> Vec<&str> {
    if let Resource::HttpRoute(route) = route {
        route.spec.rules.iter().filter_map(|rule| rule.name.as_deref()).collect()
    } else if let Resource::GrpcRoute(route) = route {
        route.spec.rules.iter().filter_map(|rule| rule.name.as_deref()).collect()
    } else {
        Vec::new()
    }
}

fn group_fits(group: &str, kind: TargetKind) -> bool {
    match kind {
        TargetKind::Service => matches!(group, "" | "core"),
        TargetKind::HttpRoute | TargetKind::GrpcRoute => group == "gateway.networking.k8s.io",
    }
}

/// A path below `spec`.
fn spec(steps: &[(&'static str, Option<usize>)]) -> Vec<Field> {
    let mut path = vec![Field::Name("spec")];
    for (name, number) in steps {
        path.push(Field::Name(name));
        path.extend(number.map(Field::Index));
    }
    path
}

#[cfg(test)]
mod tests;
