//! What an expression may be, beyond CEL: not too deep, without names that mean nothing, and with every loop paying for
//! what it looks at.

use cel::common::ast::{CallExpr, EntryExpr, Expr, IdedEntryExpr, IdedExpr, operators};

/// The one variable.
pub(super) const EVENT: &str = "event";
/// Pays for what a loop runs over. None of these three names can be written.
pub(super) const SPEND: &str = "@spend";
/// Whether there is anything left to spend.
pub(super) const OPEN: &str = "@open";
/// Fails.
pub(super) const SPENT: &str = "@spent";

/// Deepest tree: each level costs some of the stack when it is evaluated.
const MAX_DEPTH: usize = 64;
/// Sums and joins of strings and lists: each can double what there is.
const MAX_ADDITIONS: usize = 16;

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

/// Checks a tree and makes its loops pay. Returns whether it may look at the event's data.
pub(super) fn check(tree: &mut IdedExpr) -> Result<bool, String> {
    let mut walk = Walk { bound: vec![EVENT.to_owned()], additions: 0, wants_data: false };
    walk.visit(tree, MAX_DEPTH)?;
    Ok(walk.wants_data)
}

struct Walk {
    /// Variables that are known here.
    bound: Vec<String>,
    additions: usize,
    wants_data: bool,
}

impl Walk {
    fn visit(&mut self, node: &mut IdedExpr, depth: usize) -> Result<(), String> {
        let Some(depth) = depth.checked_sub(1) else {
            return Err(format!("is nested deeper than {MAX_DEPTH} levels"));
        };
        match &mut node.expr {
            Expr::Unspecified | Expr::Literal(_) => Ok(()),
            Expr::Ident(name) => self.name(name),
            Expr::Select(select) => {
                if matches!(&select.operand.expr, Expr::Ident(name) if name == EVENT) {
                    self.wants_data |= select.field == "data";
                    return Ok(());
                }
                self.visit(&mut select.operand, depth)
            }
            Expr::Call(call) => self.call(call, depth),
            Expr::List(list) => list.elements.iter_mut().try_for_each(|e| self.visit(e, depth)),
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

    fn call(&mut self, call: &mut CallExpr, depth: usize) -> Result<(), String> {
        // A loop's own steps are paid for.
        let step = matches!(call.args.first().map(|first| &first.expr), Some(Expr::Ident(name)) if name.starts_with('@'));
        if call.func_name == operators::ADD && !step {
            self.additions += 1;
            if self.additions > MAX_ADDITIONS {
                return Err(format!("adds more than {MAX_ADDITIONS} times"));
            }
        }
        if let Some(target) = &mut call.target {
            self.visit(target, depth)?;
        }
        call.args.iter_mut().try_for_each(|argument| self.visit(argument, depth))
    }

    fn entry(&mut self, entry: &mut IdedEntryExpr, depth: usize) -> Result<(), String> {
        match &mut entry.expr {
            EntryExpr::StructField(field) => self.visit(&mut field.value, depth),
            EntryExpr::MapEntry(entry) => {
                self.visit(&mut entry.key, depth)?;
                self.visit(&mut entry.value, depth)
            }
        }
    }

    fn comprehension(&mut self, node: &mut IdedExpr, depth: usize) -> Result<(), String> {
        let id = node.id;
        let Expr::Comprehension(found) = &mut node.expr else {
            return Ok(());
        };
        self.visit(&mut found.iter_range, depth)?;
        self.visit(&mut found.accu_init, depth)?;
        let range = std::mem::take(&mut found.iter_range);
        // An error in a loop does not end the loops around it, so what follows the end of the budget must cost nothing.
        let paid =
            vec![call(id, OPEN, vec![]), call(id, SPEND, vec![range]), call(id, SPENT, vec![])];
        found.iter_range = call(id, operators::CONDITIONAL, paid);
        let outer = self.bound.len();
        let inner = [Some(&found.iter_var), found.iter_var2.as_ref(), Some(&found.accu_var)];
        self.bound.extend(inner.into_iter().flatten().cloned());
        let parts = [&mut found.loop_cond, &mut found.loop_step, &mut found.result];
        let outcome = parts.into_iter().try_for_each(|part| self.visit(part, depth));
        self.bound.truncate(outer);
        outcome
    }
}

fn call(id: u64, name: &str, args: Vec<IdedExpr>) -> IdedExpr {
    let call = CallExpr { func_name: name.to_owned(), target: None, args };
    IdedExpr { id, expr: Expr::Call(call) }
}
