//! An event as expressions see it.

use std::collections::HashMap;
use std::sync::Arc;

use cel::common::ast::IdedExpr;
use cel::common::types::{CelBool, CelMap, CelMapKey, CelString};
use cel::common::value::Val;
use cel::{Context, Env, ExecutionError, Value};
use duet_events::Event;
use duet_events::cloudevent::AttributeValue;

use super::account::Account;
use super::patterns::Patterns;
use super::{EVENT, data};

/// One event, for any number of expressions, which pay from one account.
pub(super) struct Subject<'v> {
    context: Context<'v, 'v>,
    account: Arc<Account>,
}

impl<'v> Subject<'v> {
    pub(super) fn new(
        event: &'v Event,
        with_data: bool,
        env: Arc<Env>,
        patterns: &Arc<Patterns>,
    ) -> Self {
        let mut context = Context::with_env(env);
        context.add_variable_as_val(EVENT, Box::new(value(event, with_data)));
        let account = Account::open(&mut context, patterns);
        Self { context, account }
    }

    /// `price` is what the expression costs on any event.
    pub(super) fn is_true(&self, tree: &IdedExpr, price: usize) -> Result<bool, String> {
        let paid = |units| self.account.pay(units).map_err(|error| describe(&error));
        paid(price)?;
        let value = Value::resolve_val(tree, &self.context).map_err(|error| describe(&error))?;
        // `||` and `&&` go on without what was too much on one of their sides.
        paid(0)?;
        match value.downcast_ref::<CelBool>() {
            Some(matches) => Ok(*matches.inner()),
            None => Err(format!("the result is a {}, not a bool", value.get_type().name())),
        }
    }
}

/// Errors show the values that they met, which can be long and are nobody's business in a log.
fn describe(error: &ExecutionError) -> String {
    if let ExecutionError::NoSuchKey(key) = error {
        return format!("the event has no {key:?} there");
    }
    if let ExecutionError::FunctionError { function, message } = error {
        return format!("{function}: {message}");
    }
    if let ExecutionError::NoSuchOverload(overload) = error {
        return overload.to_string();
    }
    let text = error.to_string();
    let kind: String = text.chars().take_while(|c| c.is_alphabetic() || *c == ' ').collect();
    kind.trim().to_owned()
}

fn value(event: &Event, with_data: bool) -> CelMap<'_> {
    let mut map: HashMap<CelMapKey<'_>, Box<dyn Val + '_>> = HashMap::new();
    let required = [
        ("id", event.id()),
        ("source", event.source()),
        ("type", event.event_type()),
        ("specversion", "1.0"),
    ];
    for (name, text) in required {
        map.insert(name.into(), Box::new(CelString::from(text)));
    }
    for (name, value) in event.values() {
        map.insert(name.into(), attribute(value));
    }
    let bytes = event.data().filter(|_| with_data);
    let data = bytes.and_then(|bytes| data::value(event.data_content_type(), bytes));
    if let Some(data) = data {
        map.insert("data".into(), data);
    }
    CelMap::from(map)
}

/// A number is what it is in data.
fn attribute(value: AttributeValue<'_>) -> Box<dyn Val + '_> {
    match value {
        AttributeValue::String(text) => Box::new(CelString::from(text)),
        AttributeValue::Boolean(yes) => Box::new(CelBool::from(yes)),
        AttributeValue::Number(json) => {
            data::value(None, json.as_bytes()).unwrap_or_else(|| Box::new(CelString::from(json)))
        }
    }
}
