//! What the expressions of a subscription may cost on one event, in units of about 30 ns, and the functions that pay.
//! None of their names can be written: [`super::bounds`] puts them around what costs more the more it looks at.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cel::common::types::{CelBool, CelBytes, CelInt, CelList, CelMap, CelString};
use cel::common::value::{CowVal, Val};
use cel::{Context, ExecutionError, FunctionContext};

use super::patterns::Patterns;

/// Pays for all of a value: it may be copied or compared. These functions return what they are given.
pub(super) const ALL: &str = "@all";
/// Pays for a text, or for one look at a list or a map.
pub(super) const TEXT: &str = "@text";
/// Pays for a search: in all of a list, or for a key of a map.
pub(super) const SEARCH: &str = "@search";
/// Pays for the rounds of a loop over its first argument, each of which costs the second one.
pub(super) const LOOP: &str = "@loop";
/// Whether its first argument matches the pattern of this number.
pub(super) const MATCHES: &str = "@matches";

/// Some 5 ms.
const BUDGET: usize = 150_000;
/// Bytes that are copied or compared in a unit.
pub(super) const COPIED_BYTES: usize = 128;
/// Bytes that are read in a unit, as by a search for others.
const READ_BYTES: usize = 16;
/// What it takes to copy a list or a map besides what is in it.
const CONTAINER_PRICE: usize = 2;

/// What is left.
#[derive(Debug)]
pub(super) struct Account {
    left: AtomicUsize,
}

type Function = Box<
    dyn for<'c, 'v> Fn(&mut FunctionContext<'c, 'v>) -> Result<CowVal<'c, 'v>, ExecutionError>
        + Send
        + Sync,
>;

impl Account {
    /// With which `context`'s functions pay.
    pub(super) fn open(context: &mut Context<'_, '_>, patterns: &Arc<Patterns>) -> Arc<Self> {
        let account = Arc::new(Self { left: AtomicUsize::new(BUDGET) });
        let functions = [
            (ALL, account.paid(all)),
            (TEXT, account.paid(text)),
            (SEARCH, account.paid(search)),
            (LOOP, account.paid_loop()),
            (MATCHES, account.matches(Arc::clone(patterns))),
        ];
        for (name, function) in functions {
            // Their names cannot be those of standard functions.
            context.add_function(name, function).unwrap_or_default();
        }
        account
    }

    pub(super) fn pay(&self, units: usize) -> Result<(), ExecutionError> {
        self.take(|left| *left = left.saturating_sub(units))
    }

    /// Fails from when nothing is left. One evaluation is on one thread.
    fn take(&self, cost: impl FnOnce(&mut usize)) -> Result<(), ExecutionError> {
        let mut left = self.left.load(Ordering::Relaxed);
        cost(&mut left);
        self.left.store(left, Ordering::Relaxed);
        if left == 0 {
            return Err(ExecutionError::function_error("limit", "it looks at too much data"));
        }
        Ok(())
    }

    fn paid(self: &Arc<Self>, cost: fn(&dyn Val, &mut usize)) -> Function {
        let account = Arc::clone(self);
        Box::new(move |call| {
            let value = argument(call)?;
            account.take(|left| cost(value.as_ref(), left))?;
            Ok(value)
        })
    }

    fn paid_loop(self: &Arc<Self>) -> Function {
        let account = Arc::clone(self);
        Box::new(move |call| {
            let round = number(&argument(call)?);
            let range = argument(call)?;
            account.take(|left| rounds(range.as_ref(), round, left))?;
            Ok(range)
        })
    }

    fn matches(self: &Arc<Self>, patterns: Arc<Patterns>) -> Function {
        let account = Arc::clone(self);
        Box::new(move |call| {
            let number = number(&argument(call)?);
            let searched = argument(call)?;
            let Some(text) = searched.downcast_ref::<CelString<'_>>() else {
                return Err(ExecutionError::function_error("matches", "is of strings"));
            };
            let pattern = patterns.get(number).ok_or_else(none)?;
            account.pay(pattern.price(text.inner()))?;
            Ok(CowVal::owned(CelBool::from(pattern.is_match(text.inner()))))
        })
    }
}

/// The last one that was not taken yet.
fn argument<'c, 'v>(call: &mut FunctionContext<'c, 'v>) -> Result<CowVal<'c, 'v>, ExecutionError> {
    call.args.pop().ok_or_else(none)
}

fn none() -> ExecutionError {
    ExecutionError::function_error("limit", "there is nothing to pay for")
}

/// As [`super::bounds`] wrote it.
fn number(value: &CowVal<'_, '_>) -> usize {
    let number = value.downcast_ref::<CelInt>().map(|number| *number.inner());
    number.and_then(|number| usize::try_from(number).ok()).unwrap_or(usize::MAX)
}

/// Every cost ends where nothing is left, so that finding it out costs no more than that.
fn all(value: &dyn Val, left: &mut usize) {
    // It is allocated besides.
    *left = left.saturating_sub(1);
    one(value, COPIED_BYTES, left);
    if let Some(items) = value.downcast_ref::<CelList<'_>>() {
        *left = left.saturating_sub(CONTAINER_PRICE);
        for item in items.inner() {
            if *left == 0 {
                return;
            }
            all(item.as_ref(), left);
        }
    } else if let Some(map) = value.downcast_ref::<CelMap<'_>>() {
        *left = left.saturating_sub(CONTAINER_PRICE);
        for (key, item) in map.inner() {
            if *left == 0 {
                return;
            }
            keyed(key.inner(), left);
            all(item.as_ref(), left);
        }
    }
}

/// A key is hashed besides.
fn keyed(key: &dyn Val, left: &mut usize) {
    one(key, COPIED_BYTES, left);
    one(key, COPIED_BYTES, left);
}

fn text(value: &dyn Val, left: &mut usize) {
    one(value, READ_BYTES, left);
}

fn one(value: &dyn Val, unit_bytes: usize, left: &mut usize) {
    let text = value.downcast_ref::<CelString<'_>>().map(|text| text.inner().len());
    let bytes =
        text.or_else(|| value.downcast_ref::<CelBytes<'_>>().map(|bytes| bytes.inner().len()));
    *left = left.saturating_sub(1 + bytes.unwrap_or_default() / unit_bytes);
}

fn search(value: &dyn Val, left: &mut usize) {
    if value.downcast_ref::<CelList<'_>>().is_some() {
        all(value, left);
    } else {
        one(value, READ_BYTES, left);
    }
}

/// Each round has a copy of its item, which is a key where the loop is over a map.
fn rounds(range: &dyn Val, round: usize, left: &mut usize) {
    if let Some(items) = range.downcast_ref::<CelList<'_>>() {
        *left = left.saturating_sub(items.inner().len().saturating_mul(round));
        all(range, left);
    } else if let Some(map) = range.downcast_ref::<CelMap<'_>>() {
        *left = left.saturating_sub(map.inner().len().saturating_mul(round));
        for key in map.inner().keys() {
            if *left == 0 {
                return;
            }
            keyed(key.inner(), left);
        }
    }
}
