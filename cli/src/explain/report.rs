//! What becomes of a request, as data: the sidecar's own functions, asked in the sidecar's order.

use anyhow::{anyhow, bail};
use duet_api::duration;
use duet_api::proto;
use duet_control_plane::compile::explain::{Explanation, PassedOver, Place, Setting, explain};
use duet_control_plane::index::Index;
use duet_proxy::error::{ErrorType, Failure};
use duet_proxy::filter::Filters;
use duet_proxy::http::headers;
use duet_proxy::outbound::DEFAULT_TIMEOUT;
use duet_proxy::outbound::rule::{DEFAULT_IDLE_TIMEOUT, prefix};
use duet_proxy::route::RouteTable;
use http::uri::Authority;
use http::{StatusCode, header, request};
use serde::Serialize;
use serde_json::Value;

use super::{describe, notes};

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) namespace: String,
    pub(crate) service: String,
}

/// The answer.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) request: Asked,
    /// `namespace/name:port`; none where nobody knows it.
    pub(crate) destination: Option<String>,
    pub(crate) outcome: Outcome,
    /// In order of precedence.
    pub(crate) rules: Vec<Rule>,
    pub(crate) passed_over: Vec<PassedOver>,
    /// Of the rule that is used.
    pub(crate) filters: Vec<String>,
    pub(crate) backends: Vec<Backend>,
    pub(crate) settings: Vec<Setting>,
    /// What the settings mean for this request in particular.
    pub(crate) notes: Vec<String>,
}

/// The request.
#[derive(Debug, Serialize)]
pub(crate) struct Asked {
    pub(crate) from: String,
    pub(crate) method: String,
    pub(crate) url: String,
}

/// What the caller's sidecar does.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Sends the request on; `url` is what the backend sees.
    Forwarded { url: String },
    /// Answers a browser's question about cross-origin requests.
    Preflight { status: u16 },
    /// Answers with a redirect.
    Redirected { status: u16, location: String },
    /// Answers with an error; `error` is that of `Proxy-Status`.
    Failed { status: u16, error: &'static str, details: String },
}

/// One match of one rule.
#[derive(Debug, Serialize)]
pub(crate) struct Rule {
    /// As in metrics and logs.
    pub(crate) rule: String,
    /// Its name in the route.
    pub(crate) name: Option<String>,
    /// None for the default rule of a service without routes.
    pub(crate) place: Option<Place>,
    /// The first that matches.
    pub(crate) used: bool,
    /// Why it does not match; empty where it does.
    pub(crate) mismatches: Vec<String>,
}

/// Where a share of the requests goes.
#[derive(Debug, Serialize)]
pub(crate) struct Backend {
    /// `namespace/name:port`; none where the reference is broken.
    pub(crate) backend: Option<String>,
    pub(crate) percent: f64,
    /// Why the reference is broken: its share is answered with 500.
    pub(crate) broken: Option<String>,
    pub(crate) filters: Vec<String>,
    pub(crate) settings: Vec<Setting>,
}

impl Caller {
    /// Reads `service` or `namespace/service`.
    pub(crate) fn parse(text: &str, namespace: &str) -> anyhow::Result<Self> {
        let (namespace, service) = text.split_once('/').unwrap_or((namespace, text));
        if namespace.is_empty() || service.is_empty() || service.contains('/') {
            bail!("--from is a service or namespace/service, not {text:?}");
        }
        Ok(Self { namespace: namespace.to_owned(), service: service.to_owned() })
    }
}

impl Outcome {
    pub(crate) fn is_error(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    fn failed(failure: &Failure) -> Self {
        let (status, details) = (failure.status.as_u16(), failure.details.to_string());
        Self::Failed { status, error: failure.kind.name(), details }
    }
}

impl Report {
    /// What a caller's sidecar would do with a request.
    pub(crate) fn new(
        index: &Index,
        caller: &Caller,
        mut head: request::Parts,
    ) -> anyhow::Result<Self> {
        let authority = headers::authority(&head)?;
        let dialled = headers::destination(&head.headers)?;
        headers::strip_all(&mut head.headers);
        let mut report = Self::unknown(caller, &head, &authority);
        let dialled = dialled.as_ref().unwrap_or(&authority).as_str().to_ascii_lowercase();
        let explanation = match explain(index, &caller.namespace, &dialled) {
            Ok(explanation) => explanation,
            Err(why) => {
                let text = format!("{dialled:?}: {why}");
                let failure = Failure::new(ErrorType::DestinationNotFound, text);
                report.outcome = Outcome::failed(&failure);
                return Ok(report);
            }
        };
        report.destination = Some(explanation.destination.to_string());
        report.passed_over.clone_from(&explanation.passed_over);
        let table = RouteTable::compile(&explanation.rules).map_err(|why| {
            anyhow!("sidecars refuse these rules, and keep the last that they could use: {why}")
        })?;
        let used = table.find(&head);
        for (number, rule) in explanation.rules.iter().enumerate() {
            let mismatches = table.mismatches(number, &head);
            report.rules.push(Rule::new(&explanation, number, used, |wanted| {
                mismatches.iter().map(|found| describe::mismatch(found, wanted)).collect()
            }));
            if used == Some(number) {
                report.apply(&explanation, (number, rule), &head, &authority)?;
            }
        }
        Ok(report)
    }

    /// Before anything is known, and as it stays where no rule matches.
    fn unknown(caller: &Caller, head: &request::Parts, authority: &Authority) -> Self {
        let request = Asked {
            from: format!("{}/{}", caller.namespace, caller.service),
            method: head.method.to_string(),
            url: url(authority, head),
        };
        let text = format!("no rule matches {} {}", head.method, head.uri.path());
        let failure = Failure::new(ErrorType::DestinationNotFound, text);
        Self {
            request,
            destination: None,
            outcome: Outcome::failed(&failure.with_status(StatusCode::NOT_FOUND)),
            rules: Vec::new(),
            passed_over: Vec::new(),
            filters: Vec::new(),
            backends: Vec::new(),
            settings: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Takes in the rule that is used.
    fn apply(
        &mut self,
        explanation: &Explanation<'_>,
        (number, rule): (usize, &proto::Rule),
        head: &request::Parts,
        authority: &Authority,
    ) -> anyhow::Result<()> {
        self.filters = rule.filters.iter().map(describe::filter).collect();
        self.outcome = outcome(rule, head, authority)?;
        if matches!(self.outcome, Outcome::Redirected { .. } | Outcome::Preflight { .. }) {
            return Ok(());
        }
        let total: u32 = rule.backends.iter().map(|backend| backend.weight).sum();
        let backend = |raw| Backend::new(explanation, raw, total);
        self.backends = rule.backends.iter().map(backend).collect();
        let fill = |setting: &mut Setting| of_the_sidecar(setting, head);
        self.settings = explanation.settings(number);
        self.settings.iter_mut().for_each(fill);
        let of_backends = self.backends.iter_mut().flat_map(|backend| &mut backend.settings);
        of_backends.for_each(fill);
        self.notes = notes::of(rule, head)?;
        Ok(())
    }
}

impl Rule {
    fn new(
        explanation: &Explanation<'_>,
        number: usize,
        used: Option<usize>,
        mismatches: impl Fn(&proto::Match) -> Vec<String>,
    ) -> Self {
        let compiled = explanation.rules.get(number);
        let wanted = compiled.and_then(|rule| rule.r#match.clone()).unwrap_or_default();
        Self {
            rule: compiled.map(|rule| rule.name.clone()).unwrap_or_default(),
            name: explanation.rule_name(number).map(str::to_owned),
            place: explanation.place(number),
            used: used == Some(number),
            mismatches: mismatches(&wanted),
        }
    }
}

impl Backend {
    fn new(explanation: &Explanation<'_>, raw: &proto::WeightedBackend, total: u32) -> Self {
        Self {
            backend: (!raw.backend.is_empty()).then(|| raw.backend.clone()),
            percent: f64::from(raw.weight) * 100.0 / f64::from(total.max(1)),
            broken: (!raw.invalid.is_empty()).then(|| raw.invalid.clone()),
            filters: raw.filters.iter().map(describe::filter).collect(),
            settings: explanation.backend_settings(&raw.backend),
        }
    }
}

/// What the sidecar does with a request that falls under a rule.
fn outcome(
    rule: &proto::Rule,
    head: &request::Parts,
    authority: &Authority,
) -> anyhow::Result<Outcome> {
    let filters = Filters::compile(&rule.filters, prefix(rule))
        .map_err(|why| anyhow!("sidecars refuse {}: {why}", rule.name))?;
    if let Some(answer) = filters.cors().and_then(|cors| cors.preflight(head)) {
        return Ok(Outcome::Preflight { status: answer.status().as_u16() });
    }
    if let Some(redirect) = filters.redirect(head, authority) {
        let location = redirect.headers().get(header::LOCATION);
        let location = location.map(|location| String::from_utf8_lossy(location.as_bytes()));
        return Ok(Outcome::Redirected {
            status: redirect.status().as_u16(),
            location: location.unwrap_or_default().into_owned(),
        });
    }
    let share = |raw: &&proto::WeightedBackend| raw.weight > 0;
    let mut reachable = rule.backends.iter().filter(share);
    if reachable.clone().all(|raw| !raw.invalid.is_empty()) {
        let why = reachable.next().map_or("no backend has any weight", |raw| raw.invalid.as_str());
        let failure = Failure::new(ErrorType::ProxyConfigurationError, why.to_owned());
        return Ok(Outcome::failed(&failure));
    }
    let (mut head, mut authority) = (head.clone(), authority.clone());
    filters.apply_request(&mut head, &mut authority);
    Ok(Outcome::Forwarded { url: url(&authority, &head) })
}

fn url(authority: &Authority, head: &request::Parts) -> String {
    format!("http://{authority}{}", headers::path_and_query(&head.uri))
}

/// Fills in what the sidecar does where nobody says anything.
fn of_the_sidecar(setting: &mut Setting, head: &request::Parts) {
    if !setting.value.is_null() {
        return;
    }
    setting.value = match setting.name {
        "timeouts.request" if headers::is_grpc(&head.headers) => Value::Null,
        "timeouts.request" => {
            format!("{} until the response's headers", duration::format(DEFAULT_TIMEOUT)).into()
        }
        "timeouts.idle" => duration::format(DEFAULT_IDLE_TIMEOUT).into(),
        _ => Value::Null,
    };
}
