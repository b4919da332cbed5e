//! An event as expressions see it, and the account that their loops draw on.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cel::common::ast::IdedExpr;
use cel::objects::{Key, Map};
use cel::{Context, Env, ExecutionError, Value};
use duet_events::Event;

use super::bounds::{EVENT, OPEN, SPEND, SPENT};

/// Larger data is not parsed, and looking at it is an error.
const MAX_DATA_BYTES: usize = 1 << 20;
/// What all loops over one event may look at: one for each item, one more for every 64 bytes of it, and one for every
/// 16 KiB of the event's data, which each round may look at.
const BUDGET: usize = 100_000;
const UNIT_BYTES: usize = 64;
const ROUND_BYTES: usize = 16 << 10;

/// One event, for any number of expressions.
pub(super) struct Subject {
    context: Context<'static, 'static>,
}

impl Subject {
    pub(super) fn new(event: &Event, with_data: bool, env: Arc<Env>) -> Self {
        let mut context = Context::with_env(env);
        context.add_variable_from_value(EVENT, value(event, with_data));
        let round = event.data().map_or(0, |data| data.len() / ROUND_BYTES);
        let account = Arc::new(Account { left: AtomicUsize::new(BUDGET), round });
        let (open, spend) = (Arc::clone(&account), account);
        // Their names cannot be those of standard functions.
        let open = move || open.left.load(Ordering::Relaxed) > 0;
        context.add_function(OPEN, open).unwrap_or_default();
        context.add_function(SPEND, move |range: Value| spend.pay(range)).unwrap_or_default();
        context
            .add_function(SPENT, || -> Result<Value, ExecutionError> { Err(spent()) })
            .unwrap_or_default();
        Self { context }
    }

    pub(super) fn is_true(&self, tree: &IdedExpr) -> Result<bool, String> {
        match Value::resolve(tree, &self.context) {
            Ok(Value::Bool(matches)) => Ok(matches),
            Ok(other) => Err(format!("the result is a {}, not a bool", other.type_of())),
            Err(error) => Err(describe(&error)),
        }
    }
}

/// Errors show the values that they met, which can be long and are nobody's business in a log.
fn describe(error: &ExecutionError) -> String {
    if let ExecutionError::NoSuchKey(key) = error {
        return format!("the event has no {key:?} there");
    }
    if let ExecutionError::FunctionError { function, message } = error {
        return format!("{}: {message}", function.trim_start_matches('@'));
    }
    if let ExecutionError::NoSuchOverload(overload) = error {
        return overload.to_string();
    }
    let text = error.to_string();
    let kind: String = text.chars().take_while(|c| c.is_alphabetic() || *c == ' ').collect();
    kind.trim().to_owned()
}

struct Account {
    left: AtomicUsize,
    /// What a round costs beyond its item.
    round: usize,
}

impl Account {
    fn pay(&self, range: Value) -> Result<Value, ExecutionError> {
        let rounds = if let Value::List(items) = &range {
            items.len()
        } else if let Value::Map(map) = &range {
            map.map.len()
        } else {
            0
        };
        let cost = weight(&range).saturating_add(rounds.saturating_mul(self.round));
        let left = self.left.load(Ordering::Relaxed).saturating_sub(cost);
        self.left.store(left, Ordering::Relaxed);
        if left == 0 { Err(spent()) } else { Ok(range) }
    }
}

fn spent() -> ExecutionError {
    ExecutionError::function_error(SPEND, "the loops look at too much data")
}

fn weight(value: &Value) -> usize {
    if let Value::List(items) = value {
        1 + items.iter().map(weight).sum::<usize>()
    } else if let Value::Map(map) = value {
        1 + map.map.values().map(|value| 1 + weight(value)).sum::<usize>()
    } else if let Value::String(text) = value {
        1 + text.len() / UNIT_BYTES
    } else if let Value::Bytes(bytes) = value {
        1 + bytes.len() / UNIT_BYTES
    } else {
        1
    }
}

fn value(event: &Event, with_data: bool) -> Value {
    let mut map: HashMap<Key, Value> = HashMap::new();
    let required = [
        ("id", event.id()),
        ("source", event.source()),
        ("type", event.event_type()),
        ("specversion", "1.0"),
    ];
    let others = event.attributes().iter().map(|(name, text)| (name.as_str(), text.as_str()));
    for (name, text) in required.into_iter().chain(others) {
        map.insert(name.to_owned().into(), text.into());
    }
    let bytes = event.data().filter(|bytes| with_data && bytes.len() <= MAX_DATA_BYTES);
    if let Some(bytes) = bytes {
        map.insert("data".to_owned().into(), data(event.data_content_type(), bytes));
    }
    Value::Map(Map { map: Arc::new(map) })
}

/// JSON as what it says, other text as a string, the rest as bytes.
fn data(content_type: Option<&str>, bytes: &[u8]) -> Value {
    if is_json(content_type)
        && let Ok(json) = serde_json::from_slice::<serde_json::Value>(bytes)
    {
        return from_json(json);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => bytes.to_vec().into(),
    }
}

/// Data without a content type is JSON (CloudEvents JSON format, section 3.1).
fn is_json(content_type: Option<&str>) -> bool {
    let Some(content_type) = content_type else {
        return true;
    };
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence.split_once('/').is_some_and(|(_, sub)| sub == "json" || sub.ends_with("+json"))
}

fn from_json(json: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::Null,
        Json::Bool(yes) => Value::Bool(yes),
        Json::Number(number) => {
            let whole = number.as_i64().map(Value::Int);
            let whole = whole.or_else(|| number.as_u64().map(Value::UInt));
            whole.unwrap_or_else(|| Value::Float(number.as_f64().unwrap_or(f64::NAN)))
        }
        Json::String(text) => text.into(),
        Json::Array(items) => Value::List(Arc::new(items.into_iter().map(from_json).collect())),
        Json::Object(members) => {
            let members = members.into_iter().map(|(name, value)| (name.into(), from_json(value)));
            Value::Map(Map { map: Arc::new(members.collect()) })
        }
    }
}
