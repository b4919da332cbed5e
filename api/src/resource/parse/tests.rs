use super::*;

fn error(text: &str) -> String {
    let parsed = parse("a.yaml", text);
    let errors: Vec<String> = parsed.errors.iter().map(ToString::to_string).collect();
    errors.join("\n")
}

const POLICY: &str = "\
apiVersion: duet.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: payments, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: payments}]
  timeouts:
    request: 2s
  retry: {attempts: 2, codes: [503], grpcCodes: [unavailable], backoff: 25ms, maxBodyBytes: 64Ki}
";

#[test]
fn a_policy_parses_and_its_units_are_read() {
    let parsed = parse("a.yaml", POLICY);
    assert_eq!(parsed.errors, []);
    let Resource::TrafficPolicy(policy) = &parsed.resources[0].resource else { panic!() };
    assert_eq!(policy.spec.timeouts.request, Some(std::time::Duration::from_secs(2)));
    assert_eq!(policy.spec.retry.as_ref().unwrap().max_body_bytes, Some(65_536));
    assert_eq!(parsed.resources[0].resource.key().to_string(), "TrafficPolicy shop/payments");
}

#[test]
fn errors_name_file_line_and_field() {
    let two = format!("# a comment\n---\n{POLICY}---\n{}", POLICY.replace("2s", "2 seconds"));
    let error = error(&two);
    assert!(
        error.starts_with("a.yaml:18:5: spec.timeouts.request: \"2 seconds\" is not a duration"),
        "{error}"
    );
}

#[test]
fn unknown_fields_are_named() {
    let error = error(&POLICY.replace("timeouts:", "timeout:"));
    assert!(error.contains("a.yaml:6"), "{error}");
    assert!(error.contains("unknown field `timeout`"), "{error}");
}

#[test]
fn a_bad_document_does_not_hide_the_others() {
    let text = format!("{}---\n{POLICY}", POLICY.replace("503", "99"));
    let parsed = parse("a.yaml", &text);
    assert_eq!((parsed.resources.len(), parsed.errors.len()), (1, 1));
    assert!(parsed.errors[0].message.contains("99 is not an HTTP status"), "{}", parsed.errors[0]);
}

#[test]
fn unknown_kinds_of_our_group_are_errors_and_foreign_kinds_are_not() {
    let error = error("apiVersion: duet.dev/v1alpha1\nkind: TrafficPolice\nmetadata: {name: a}\n");
    assert!(error.starts_with("a.yaml:2:7: kind: unknown kind \"TrafficPolice\""), "{error}");
    let parsed = parse("a.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n");
    assert_eq!(parsed, Parsed::default());
}

#[test]
fn malformed_yaml_names_the_line() {
    let error = error("apiVersion: v1\nkind: Service\nmetadata: {name: a\nspec: 1\n");
    assert!(error.starts_with("a.yaml:"), "{error}");
    assert!(!error.starts_with("a.yaml:1:1"), "{error}");
}

#[test]
fn names_are_checked() {
    let error = error("apiVersion: v1\nkind: Service\nmetadata: {name: Orders}\n");
    assert!(error.contains("a.yaml:3") && error.contains("metadata.name"), "{error}");
}

#[test]
fn fields_are_located_for_later_errors() {
    let parsed = parse("a.yaml", POLICY);
    let path =
        [Field::Name("spec"), Field::Name("targetRefs"), Field::Index(0), Field::Name("name")];
    let error = parsed.resources[0].origin.error(&path, "no such service".to_owned());
    assert_eq!(error.to_string(), "a.yaml:5:38: spec.targetRefs[0].name: no such service");
    let absent = [Field::Name("spec"), Field::Name("absent")];
    assert_eq!(parsed.resources[0].origin.error(&absent, String::new()).line, 5);
    let second = parse("a.yaml", &format!("# first\n---\n{POLICY}"));
    let request = [Field::Name("spec"), Field::Name("timeouts"), Field::Name("request")];
    assert_eq!(second.resources[0].origin.line_of(&request), 9);
}

#[test]
fn a_creation_timestamp_is_kept() {
    let with = |timestamp: &str| {
        let metadata = format!("{{name: payments, creationTimestamp: {timestamp}}}");
        parse("a.yaml", &POLICY.replace("{name: payments, namespace: shop}", &metadata))
    };
    let of = |timestamp: &str| {
        with(timestamp).resources.first().unwrap().resource.metadata().creation_timestamp
    };
    assert!(of("2026-01-02T03:04:05Z") < of("'2026-01-02T03:04:06Z'"));
    assert_eq!(of("null"), None);
    assert!(with("yesterday").errors[0].to_string().contains("metadata.creationTimestamp"));
}

#[test]
fn empty_and_comment_only_files_hold_nothing() {
    assert_eq!(parse("a.yaml", ""), Parsed::default());
    assert_eq!(parse("a.yaml", "# nothing\n---\n\n---\n"), Parsed::default());
}
