//! An attribute that is compared with a text: it may be a number or a boolean.
//!
//! What an attribute is, its publisher says, and in the headers of binary mode it is always text. So one that is compared
//! with a text that reads as a number or a boolean is compared with that as well: `event.priority == "5"` is true of the
//! number, too. That is the way in which all attributes were compared before they had types.

use cel::common::ast::{CallExpr, Expr, IdedExpr, LiteralValue, operators};
use cel::common::types::{CelBool, CelInt};

use super::EVENT;

/// Steps that [`or_value`] adds.
pub(super) const STEPS: usize = 4;

/// What is always text, or is no attribute.
const OTHERS: [&str; 9] = [
    "data",
    "datacontenttype",
    "dataschema",
    "id",
    "source",
    "specversion",
    "subject",
    "time",
    "type",
];

/// Makes a comparison, `==` or `!=`, one with the value of a text as well. False where it is of nothing of the kind.
pub(super) fn or_value(node: &mut CallExpr) -> bool {
    let [left, right] = node.args.as_slice() else {
        return false;
    };
    let (attribute, value) = match (value(left), value(right)) {
        (None, Some(value)) => (left, value),
        (Some(value), None) => (right, value),
        (None, None) | (Some(_), Some(_)) => return false,
    };
    if !is_attribute(attribute) {
        return false;
    }
    let both = if node.func_name == operators::EQUALS {
        operators::LOGICAL_OR
    } else {
        operators::LOGICAL_AND
    };
    let second = call(node.func_name.clone(), vec![attribute.clone(), value]);
    let first = std::mem::take(node);
    let both_sides = [first, second].map(|call| IdedExpr { id: 0, expr: Expr::Call(call) });
    *node = call(both.to_owned(), both_sides.into());
    true
}

/// Adds to a list in which an attribute is looked for what its texts are as values.
pub(super) fn and_values(attribute: &IdedExpr, list: &mut IdedExpr) {
    if let Expr::List(list) = &mut list.expr
        && is_attribute(attribute)
    {
        let values: Vec<_> = list.elements.iter().filter_map(value).collect();
        list.elements.extend(values);
    }
}

/// What a text says as a value, as a publisher would have written it.
fn value(node: &IdedExpr) -> Option<IdedExpr> {
    let Expr::Literal(LiteralValue::String(text)) = &node.expr else {
        return None;
    };
    let value = match text.inner() {
        "true" => LiteralValue::Boolean(CelBool::from(true)),
        "false" => LiteralValue::Boolean(CelBool::from(false)),
        text => {
            let number: i64 = text.parse().ok()?;
            (number.to_string() == text).then(|| LiteralValue::Int(CelInt::from(number)))?
        }
    };
    Some(IdedExpr { id: node.id, expr: Expr::Literal(value) })
}

/// Whether it is an attribute that may be something else than text: `event.priority`, or `event["priority"]`.
fn is_attribute(node: &IdedExpr) -> bool {
    let is_event = |node: &IdedExpr| matches!(&node.expr, Expr::Ident(name) if name == EVENT);
    if let Expr::Select(select) = &node.expr {
        return is_event(&select.operand)
            && !select.test
            && !OTHERS.contains(&select.field.as_str());
    }
    if let Expr::Call(call) = &node.expr
        && call.func_name == operators::INDEX
        && let [of, IdedExpr { expr: Expr::Literal(LiteralValue::String(name)), .. }] =
            call.args.as_slice()
    {
        return is_event(of) && !OTHERS.contains(&name.inner());
    }
    false
}

fn call(func_name: String, args: Vec<IdedExpr>) -> CallExpr {
    CallExpr { func_name, target: None, args }
}
