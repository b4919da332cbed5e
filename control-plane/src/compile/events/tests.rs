use super::*;
use crate::compile::testing::index;

fn who(account: &str) -> SpiffeId {
    SpiffeId::new("duet.local", "shop", account).unwrap()
}

fn wanted(name: &str, bus: &str, topic: &str) -> proto::Subscription {
    let (name, bus, topic) = (name.to_owned(), bus.to_owned(), topic.to_owned());
    proto::Subscription { name, bus, topic, ..Default::default() }
}

/// What becomes of this name for an account.
fn consume(
    index: &Index,
    account: &str,
    (name, bus, topic): (&str, &str, &str),
) -> Result<Consumable, String> {
    consumable(index, &who(account), wanted(&format!("shop/{name}"), bus, topic))
}

const READER: &str = "8c6b7a2e-3a55-4e0c-9d0b-0b7a52f3a111";

#[test]
fn an_application_consumes_what_its_own_sidecar_calls_its_subscription() {
    let index = index(
        "{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop, annotations: \
         {duet.dev/service-accounts: web}}}",
    );
    let reader = format!("web.sse.{READER}");
    for (account, name, bus, topic) in [
        ("web", "web.orders.placed", "default", "orders.placed"),
        ("web", "web.audit.orders.placed", "audit", "orders.placed"),
        ("web", "api.orders", "default", "orders"),
        ("web", "web.a/b@c", "default", "a/b@c"),
        ("web.eu", "web.eu.orders", "default", "orders"),
        ("web.eu", "web.eu.audit.orders", "audit", "orders"),
        ("client", "client.orders", "default", "orders"),
        ("web", reader.as_str(), "audit", "orders"),
    ] {
        let found = consume(&index, account, (name, bus, topic)).unwrap();
        let subscription = wanted(&format!("shop/{name}"), bus, topic);
        assert_eq!(found, Consumable { subscription, declared: false }, "{account} {name}");
    }
}

#[test]
fn a_sidecar_without_a_service_has_readers_and_nothing_else() {
    let (index, reader) = (Index::default(), format!("client.sse.{READER}"));
    assert!(consume(&index, "anyone", (&reader, "default", "orders")).is_ok());
    assert!(consume(&index, "anyone", ("client.orders", "default", "orders")).is_err());
    assert!(consume(&index, "anyone", ("client.sse.1", "default", "orders")).is_err());
}

#[test]
fn a_subscription_of_another_service_is_not_ones_own_whatever_it_is_called() {
    let (index, reader) = (Index::default(), format!("payments.sse.{READER}"));
    for (account, name, bus, topic) in [
        ("web", "payments.orders.placed", "default", "orders.placed"),
        // Another topic than that of its name: whoever has it waits there.
        ("web", "payments.orders.placed", "default", "junk"),
        ("payments", "payments.orders.placed", "default", "junk"),
        ("payments", "payments.orders", "audit", "orders"),
        ("web", reader.as_str(), "default", "orders"),
        // Its own service may have a dot.
        ("web", "web.eu.orders", "default", "orders"),
        ("web.eu", "web.orders", "default", "orders"),
        ("web", "web", "default", "orders"),
        ("web", "weborders", "default", "orders"),
        ("web", ".orders", "default", "orders"),
        ("web", "orders", "default", "orders"),
        ("web", "", "default", ""),
    ] {
        let found = consume(&index, account, (name, bus, topic));
        assert!(found.is_err(), "{account} {name}: {found:?}");
    }
    let why = consume(&index, "web", ("payments.orders", "default", "orders")).unwrap_err();
    assert!(why.contains("\"web\" may not serve shop/payments"), "{why}");
}

#[test]
fn what_a_resource_declares_counts_as_declared() {
    let index = index(
        "{apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {name: web.orders, namespace: shop}, spec: \
         {topic: t, subscriber: {service: payments, path: /e}}}\n---\n\
         {apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {name: all, namespace: shop}, spec: \
         {topic: t, broadcast: true, subscriber: {service: payments, path: /e}}}",
    );
    let found = consume(&index, "payments", ("web.orders", "default", "orders")).unwrap();
    assert_eq!((found.subscription.topic.as_str(), found.declared), ("t", true));
    assert!(consume(&index, "web", ("web.orders", "default", "orders")).is_err());
    let found = consume(&index, "payments", ("all@payments-1", "default", "t")).unwrap();
    assert_eq!((found.subscription.name.as_str(), found.declared), ("shop/all@payments-1", true));
    assert!(consume(&index, "payments", ("all@", "default", "t")).is_err());
    assert!(consume(&index, "web", ("all@payments-1", "default", "t")).is_err());
}

#[test]
fn a_bus_that_takes_declared_topics_only_makes_no_other_for_dead_letters() {
    let index = index(
        "{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {name: strict}, spec: {backend: {embedded: {}}, \
         declaredTopicsOnly: true}}\n---\n\
         {apiVersion: duet.dev/v1alpha1, kind: Topic, metadata: {name: t}, spec: {bus: strict}}\n---\n\
         {apiVersion: duet.dev/v1alpha1, kind: Topic, metadata: {name: poison}, spec: {bus: strict}}",
    );
    let consume = |letters: &str| {
        let wanted = proto::Subscription {
            dead_letter_topic: letters.to_owned(),
            ..wanted("shop/web.strict.t", "strict", "t")
        };
        consumable(&index, &who("web"), wanted).map(|found| found.declared)
    };
    for letters in ["", "t.dead-letter", "poison"] {
        assert_eq!(consume(letters), Ok(false), "{letters}");
    }
    assert!(consume("junk").unwrap_err().contains("declared topics only"));
}
