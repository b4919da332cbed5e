//! What an expression may be, beyond CEL: not too deep, and without names that mean nothing. What a step costs by itself
//! is added up here; where it costs more the more it looks at, a function that pays is put around what it looks at.

use cel::common::ast::{
    CallExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, LiteralValue, operators,
};
use cel::common::types::CelInt;

use super::account::{ALL, COPIED_BYTES, LOOP, MATCHES, SEARCH, TEXT};
use super::patterns::Patterns;
use super::{EVENT, texts};

/// Deepest tree: each level costs some of the stack when it is evaluated.
const MAX_DEPTH: usize = 64;
/// What a function costs beyond a step, such as to read a time.
const CALL_PRICE: usize = 10;
/// What a loop costs without its rounds, and a round without its steps.
const LOOP_PRICE: usize = 4;

/// Names of types, as in `type(event.data.total) == int`.
const TYPES: [&str; 12] = [
    "int",
    "uint",
    "double",
    "string",
    "bytes",
    "bool",
    "list",
    "map",
    "null_type",
    "type",
    "google",
    "optional_type",
];

/// What is known of an expression.
pub(super) struct Bounded {
    /// It may look at the event's data.
    pub(super) wants_data: bool,
    /// What its steps cost, without rounds of loops.
    pub(super) price: usize,
}

/// Checks a tree and makes it pay.
pub(super) fn check(tree: &mut IdedExpr, patterns: &mut Patterns) -> Result<Bounded, String> {
    let bound = vec![EVENT.to_owned()];
    let mut walk = Walk { bound, patterns, wants_data: false, price: 0, scopes: 0 };
    walk.visit(tree, MAX_DEPTH)?;
    Ok(Bounded { wants_data: walk.wants_data, price: walk.price })
}

struct Walk<'a> {
    /// Variables that are known here.
    bound: Vec<String>,
    patterns: &'a mut Patterns,
    wants_data: bool,
    /// Of the steps so far, in the innermost loop only.
    price: usize,
    /// Loops around. A name is looked up in each.
    scopes: usize,
}

impl Walk<'_> {
    fn visit(&mut self, node: &mut IdedExpr, depth: usize) -> Result<(), String> {
        let Some(depth) = depth.checked_sub(1) else {
            return Err(format!("is nested deeper than {MAX_DEPTH} levels"));
        };
        self.price += 1 + self.scopes;
        match &mut node.expr {
            Expr::Unspecified => Ok(()),
            Expr::Literal(literal) => {
                self.price += bytes(literal) / COPIED_BYTES;
                Ok(())
            }
            Expr::Ident(name) => self.name(name),
            Expr::Select(select) => {
                if matches!(&select.operand.expr, Expr::Ident(name) if name == EVENT) {
                    self.wants_data |= select.field == "data";
                    return Ok(());
                }
                self.visit(&mut select.operand, depth)
            }
            Expr::Call(call) => self.call(call, depth),
            // Lists and maps have copies of what is put into them.
            Expr::List(list) => list.elements.iter_mut().try_for_each(|e| self.paid(e, ALL, depth)),
            Expr::Map(map) => map.entries.iter_mut().try_for_each(|e| self.entry(e, depth)),
            Expr::Struct(of) => of.entries.iter_mut().try_for_each(|e| self.entry(e, depth)),
            Expr::Comprehension(_) => self.comprehension(node, depth),
        }
    }

    fn name(&mut self, name: &str) -> Result<(), String> {
        // The event as a whole.
        self.wants_data |= name == EVENT;
        if TYPES.contains(&name) || self.bound.iter().any(|bound| bound == name) {
            return Ok(());
        }
        Err(format!("{name:?} is not known here; the one variable is {EVENT:?}"))
    }

    /// Visits what `payer` is put around. What is written out in the expression is paid for as it is, and so is a list
    /// of that; what a loop has gathered is added to without a copy.
    fn paid(&mut self, node: &mut IdedExpr, payer: &str, depth: usize) -> Result<(), String> {
        self.visit(node, depth)?;
        let gathered = matches!(&node.expr, Expr::Ident(name) if name.starts_with('@'));
        let free = gathered || matches!(node.expr, Expr::Literal(_) | Expr::List(_));
        if !free {
            self.price += 1;
            wrap(node, payer, None);
        }
        Ok(())
    }

    fn call(&mut self, node: &mut CallExpr, depth: usize) -> Result<(), String> {
        if node.func_name == "matches" {
            return self.matches(node, depth);
        }
        match (node.func_name.as_str(), node.args.as_mut_slice()) {
            (operators::EQUALS | operators::NOT_EQUALS, [left, right]) => {
                // As far as they are alike, which is no further than either of them goes.
                let known = [&left, &right].iter().any(|e| matches!(e.expr, Expr::Literal(_)));
                if known {
                    self.visit(left, depth)?;
                } else {
                    self.paid(left, ALL, depth)?;
                }
                self.visit(right, depth)?;
                if texts::or_value(node) {
                    self.price += texts::STEPS * (1 + self.scopes);
                }
                Ok(())
            }
            (operators::IN, [item, container]) => {
                texts::and_values(item, container);
                self.paid(item, ALL, depth)?;
                self.paid(container, SEARCH, depth)
            }
            (operators::INDEX, [container, index]) => {
                self.visit(container, depth)?;
                self.paid(index, ALL, depth)
            }
            (
                operators::CONDITIONAL
                | operators::LOGICAL_AND
                | operators::LOGICAL_OR
                | operators::LOGICAL_NOT
                | operators::NOT_STRICTLY_FALSE
                | operators::NEGATE,
                steps,
            ) => steps.iter_mut().try_for_each(|step| self.visit(step, depth)),
            // Where two do not fit, they are copied into the error.
            (
                operators::ADD
                | operators::SUBSTRACT
                | operators::MULTIPLY
                | operators::DIVIDE
                | operators::MODULO
                | operators::LESS
                | operators::LESS_EQUALS
                | operators::GREATER
                | operators::GREATER_EQUALS,
                operands,
            ) => operands.iter_mut().try_for_each(|operand| self.paid(operand, ALL, depth)),
            (_, arguments) => {
                self.price += CALL_PRICE;
                let target = node.target.as_deref_mut().into_iter();
                target.chain(arguments).try_for_each(|argument| self.paid(argument, TEXT, depth))
            }
        }
    }

    /// A pattern takes much longer to compile than to search for, so that it is compiled once, here.
    fn matches(&mut self, node: &mut CallExpr, depth: usize) -> Result<(), String> {
        let arguments = node.target.take().map(|target| *target).into_iter();
        let arguments = arguments.chain(std::mem::take(&mut node.args));
        let Ok([mut text, pattern]) = <[_; 2]>::try_from(arguments.collect::<Vec<_>>()) else {
            return Err("matches has one pattern, as in event.type.matches('^order')".to_owned());
        };
        let Expr::Literal(LiteralValue::String(pattern)) = pattern.expr else {
            return Err("the pattern of matches must be written out, between quotes".to_owned());
        };
        self.visit(&mut text, depth)?;
        self.price += CALL_PRICE;
        let number = self.patterns.add(pattern.inner())?;
        *node = call(MATCHES, vec![text, int(number)]);
        Ok(())
    }

    fn entry(&mut self, entry: &mut IdedEntryExpr, depth: usize) -> Result<(), String> {
        match &mut entry.expr {
            EntryExpr::StructField(field) => self.paid(&mut field.value, ALL, depth),
            EntryExpr::MapEntry(entry) => {
                self.paid(&mut entry.key, ALL, depth)?;
                self.paid(&mut entry.value, ALL, depth)
            }
        }
    }

    fn comprehension(&mut self, node: &mut IdedExpr, depth: usize) -> Result<(), String> {
        let Expr::Comprehension(found) = &mut node.expr else {
            return Ok(());
        };
        self.visit(&mut found.iter_range, depth)?;
        self.visit(&mut found.accu_init, depth)?;
        self.price += LOOP_PRICE;
        let outer = self.bound.len();
        let inner = [Some(&found.iter_var), found.iter_var2.as_ref(), Some(&found.accu_var)];
        self.bound.extend(inner.into_iter().flatten().cloned());
        self.scopes += 1;
        self.visit(&mut found.result, depth)?;
        let around = std::mem::replace(&mut self.price, LOOP_PRICE);
        self.visit(&mut found.loop_cond, depth)?;
        self.visit(&mut found.loop_step, depth)?;
        let round = std::mem::replace(&mut self.price, around);
        self.scopes -= 1;
        self.bound.truncate(outer);
        wrap(&mut found.iter_range, LOOP, Some(int(round)));
        Ok(())
    }
}

fn bytes(literal: &LiteralValue) -> usize {
    match literal {
        LiteralValue::String(text) => text.inner().len(),
        LiteralValue::Bytes(bytes) => bytes.inner().len(),
        LiteralValue::Boolean(_)
        | LiteralValue::Double(_)
        | LiteralValue::Int(_)
        | LiteralValue::Null
        | LiteralValue::UInt(_) => 0,
    }
}

fn wrap(node: &mut IdedExpr, function: &str, second: Option<IdedExpr>) {
    let (id, first) = (node.id, std::mem::take(node));
    let arguments = std::iter::once(first).chain(second).collect();
    *node = IdedExpr { id, expr: Expr::Call(call(function, arguments)) };
}

fn call(name: &str, args: Vec<IdedExpr>) -> CallExpr {
    CallExpr { func_name: name.to_owned(), target: None, args }
}

fn int(number: usize) -> IdedExpr {
    let number = CelInt::from(i64::try_from(number).unwrap_or(i64::MAX));
    IdedExpr { id: 0, expr: Expr::Literal(LiteralValue::Int(number)) }
}
