//! Who may publish to a topic and subscribe to it. Pure: what is decided is counted and logged by whoever asks.

use std::collections::BTreeSet;

use duet_api::proto;
use duet_api::resource::{AuthorizationAction, AuthorizationPolicy, Operation, Resource};
use duet_api::spiffe::SpiffeId;

use crate::index::{Index, object};

/// End of a dead-letter topic's name. Without policies of its own it has those of the topic whose events it keeps.
const DEAD_LETTER: &str = ".dead-letter";

/// A decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Why not, for the workload to read; none where it may.
    pub denied: Option<String>,
    /// `Audit` policies that match, as `namespace/name`.
    pub audited: Vec<String>,
}

/// Decides whether a workload may do something with a topic.
#[must_use]
pub fn authorize(index: &Index, who: &SpiffeId, operation: Operation, topic: &str) -> Decision {
    let policies = policies(index, topic);
    if policies.is_empty() {
        return Decision::default();
    }
    let (identity, namespace) = (who.to_string(), who.namespace());
    let mut decision = Decision::default();
    let (mut restricted, mut allowed) = (false, false);
    for policy in policies {
        let spec = &policy.spec;
        let matches = spec.rules.iter().any(|rule| rule.matches(&identity, namespace, operation));
        let name = format!("{}/{}", policy.metadata.namespace, policy.metadata.name);
        match spec.action {
            AuthorizationAction::Allow => {
                restricted = true;
                allowed |= matches;
            }
            AuthorizationAction::Deny if matches && decision.denied.is_none() => {
                let by = format!("AuthorizationPolicy {name} denies it");
                decision.denied = Some(refusal(who, operation, topic, &by));
            }
            AuthorizationAction::Audit if matches => decision.audited.push(name),
            AuthorizationAction::Deny | AuthorizationAction::Audit => {}
        }
    }
    if restricted && !allowed && decision.denied.is_none() {
        let by = "no AuthorizationPolicy allows it";
        decision.denied = Some(refusal(who, operation, topic, by));
    }
    decision
}

fn refusal(who: &SpiffeId, operation: Operation, topic: &str, by: &str) -> String {
    let what = match operation {
        Operation::Publish => "publish to",
        Operation::Subscribe => "subscribe to",
    };
    format!("{who} may not {what} topic {topic:?}: {by}")
}

/// The policies of a topic, by key.
fn policies<'i>(index: &'i Index, topic: &str) -> Vec<&'i AuthorizationPolicy> {
    let of = |topic: &str| {
        let referrers = index.referrers(&object("Topic", "", topic));
        let policies = referrers.filter_map(|located| {
            if let Resource::AuthorizationPolicy(policy) = &located.resource {
                Some(policy)
            } else {
                None
            }
        });
        policies.collect::<Vec<_>>()
    };
    let mut topic = topic;
    loop {
        let found = of(topic);
        match topic.strip_suffix(DEAD_LETTER) {
            // Dead letters of those that read dead letters are still events of the first topic.
            Some(whose) if found.is_empty() => topic = whose,
            _ => return found,
        }
    }
}

/// Topics that a workload may not publish to.
#[must_use]
pub(super) fn denied_topics(index: &Index, who: &SpiffeId) -> Vec<proto::DeniedTopic> {
    let mut topics = BTreeSet::new();
    for located in index.of_kind("AuthorizationPolicy") {
        if let Resource::AuthorizationPolicy(policy) = &located.resource {
            for target in &policy.spec.target_refs {
                topics.insert(target.name.clone());
                topics.insert(format!("{}{DEAD_LETTER}", target.name));
            }
        }
    }
    let denied = topics.into_iter().filter_map(|topic| {
        let reason = authorize(index, who, Operation::Publish, &topic).denied?;
        Some(proto::DeniedTopic { topic, reason })
    });
    denied.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::testing::index;

    fn policy(name: &str, spec: &str) -> String {
        format!(
            "apiVersion: duet.dev/v1alpha1\nkind: AuthorizationPolicy\n\
             metadata: {{name: {name}, namespace: ops}}\nspec: {spec}\n---\n"
        )
    }

    fn may(index: &Index, who: (&str, &str), operation: Operation, topic: &str) -> Decision {
        let who = SpiffeId::new("duet.local", who.0, who.1).unwrap();
        authorize(index, &who, operation, topic)
    }

    const ORDERS: (&str, &str) = ("shop", "orders");
    const WEB: (&str, &str) = ("shop", "web");
    const OPS: (&str, &str) = ("ops", "audit");

    #[test]
    fn without_a_policy_everybody_may() {
        let index = index(&policy(
            "p",
            "{targetRefs: [{kind: Topic, name: other}], action: Deny, rules: [{}]}",
        ));
        assert_eq!(may(&index, WEB, Operation::Publish, "orders"), Decision::default());
    }

    #[test]
    fn an_allow_policy_keeps_everybody_else_out() {
        let index = index(&policy(
            "p",
            "{targetRefs: [{kind: Topic, name: orders}], rules: [\
             {from: [{identities: ['spiffe://duet.local/ns/shop/sa/orders']}], to: [{operations: [publish]}]},\
             {from: [{namespaces: [ops]}]}]}",
        ));
        let allowed = |who, operation| may(&index, who, operation, "orders").denied.is_none();
        assert!(allowed(ORDERS, Operation::Publish) && !allowed(ORDERS, Operation::Subscribe));
        assert!(allowed(OPS, Operation::Publish) && allowed(OPS, Operation::Subscribe));
        assert!(!allowed(WEB, Operation::Publish));
        let why = may(&index, WEB, Operation::Publish, "orders").denied.unwrap();
        assert_eq!(
            why,
            "spiffe://duet.local/ns/shop/sa/web may not publish to topic \"orders\": no \
             AuthorizationPolicy allows it"
        );
        // Who may not read events may not read them once they were given up, either.
        let dead = may(&index, WEB, Operation::Subscribe, "orders.dead-letter");
        assert!(dead.denied.is_some());
    }

    #[test]
    fn deny_wins_and_audit_only_takes_note() {
        let target = "targetRefs: [{group: duet.dev, kind: Topic, name: orders}]";
        let yaml = policy("allow", &format!("{{{target}, rules: [{{}}]}}"))
            + &policy(
                "deny",
                &format!(
                    "{{{target}, action: Deny, rules: [{{from: [{{identities: ['spiffe://duet.local/ns/shop/*'], \
                 namespaces: [shop]}}]}}]}}"
                ),
            )
            + &policy("note", &format!("{{{target}, action: Audit, rules: [{{}}]}}"));
        let index = index(&yaml);
        let decision = may(&index, ORDERS, Operation::Publish, "orders");
        assert!(decision.denied.unwrap().contains("AuthorizationPolicy ops/deny denies it"));
        assert_eq!(decision.audited, ["ops/note"]);
        assert_eq!(may(&index, OPS, Operation::Subscribe, "orders").denied, None);
    }

    #[test]
    fn dead_letters_of_dead_letters_are_no_way_around() {
        let index = index(&policy("p", "{targetRefs: [{kind: Topic, name: orders}]}"));
        for topic in ["orders.dead-letter", "orders.dead-letter.dead-letter"] {
            assert!(may(&index, WEB, Operation::Subscribe, topic).denied.is_some(), "{topic}");
        }
        assert_eq!(may(&index, WEB, Operation::Subscribe, "other.dead-letter").denied, None);
    }

    #[test]
    fn an_allow_policy_without_rules_lets_nobody_in() {
        let index = index(&policy("p", "{targetRefs: [{kind: Topic, name: orders}]}"));
        assert!(may(&index, ORDERS, Operation::Publish, "orders").denied.is_some());
    }

    #[test]
    fn sidecars_are_told_what_they_may_not_publish_to() {
        let index = index(&policy(
            "p",
            "{targetRefs: [{kind: Topic, name: orders}, {kind: Topic, name: stock}], rules: [\
             {from: [{identities: ['spiffe://duet.local/ns/shop/sa/orders']}]}]}",
        ));
        let denied = |account: &str| {
            let who = SpiffeId::new("duet.local", "shop", account).unwrap();
            let denied = denied_topics(&index, &who).into_iter().map(|denied| denied.topic);
            denied.collect::<Vec<_>>()
        };
        assert_eq!(denied("orders"), Vec::<String>::new());
        assert_eq!(denied("web"), ["orders", "orders.dead-letter", "stock", "stock.dead-letter"]);
    }
}
