//! CEL expressions over events: a subscription's filter and the matches of its routes. As in Dapr the one variable is
//! `event`: every attribute by its name, and `data`, which is parsed only where an expression looks at it.
//!
//! An expression comes from whoever can write a subscription, and is evaluated between everybody's events, so that it
//! is bounded: in length, in depth, in the data that it is given, and in what it may cost on one event. Whatever takes
//! time by what it looks at pays for that before it runs (`account`); `bounds` rewrites expressions so that they
//! do. Imports nothing of this crate.

mod account;
mod bounds;
mod data;
mod patterns;
mod subject;
mod texts;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock};

use cel::common::ast::{CallExpr, Expr, IdedExpr, LiteralValue};
use cel::parser::ParseErrors;
use cel::{Context, Env, ExecutionError, Value};
use duet_events::Event;
use duet_events::bus::{MAX_EXPRESSION_BYTES, SubscriptionSpec};

use patterns::Patterns;
use subject::Subject;

/// The one variable.
const EVENT: &str = "event";

/// Longest together, of one subscription: what it takes to parse them.
const MAX_TOTAL_BYTES: usize = 16 << 10;
/// A deep expression is parsed with more room than a worker's stack has.
const PARSER_STACK_BYTES: usize = 32 << 20;

// Optional values would be copied where nothing pays for it.
static ENV: LazyLock<Arc<Env>> =
    LazyLock::new(|| Arc::new(Env::stdlib().with_optional_support(false)));

/// A checked expression.
#[derive(Debug)]
struct Expression {
    tree: IdedExpr,
    /// It looks at `event.data`, or may.
    wants_data: bool,
    /// What it costs to evaluate, beyond what depends on the event.
    price: usize,
}

impl Expression {
    /// Parses and checks. Needs [`PARSER_STACK_BYTES`].
    fn compile(source: &str, patterns: &mut Patterns) -> Result<Self, String> {
        if source.trim().is_empty() {
            return Err("is empty".to_owned());
        }
        if source.len() > MAX_EXPRESSION_BYTES {
            return Err(format!("has {} bytes, more than {MAX_EXPRESSION_BYTES}", source.len()));
        }
        let mut tree = ENV
            .parser()
            .parse(source)
            .map_err(|errors| format!("is not CEL: {}", first(&errors)))?;
        let bounded = bounds::check(&mut tree, patterns)?;
        for name in tree.references().functions() {
            if !is_known(name) {
                return Err(format!("there is no function {name:?}"));
            }
        }
        Ok(Self { tree, wants_data: bounded.wants_data, price: bounded.price })
    }
}

fn first(errors: &ParseErrors) -> String {
    let Some(error) = errors.errors.first() else {
        return "it cannot be parsed".to_owned();
    };
    let text = error.msg.lines().next().unwrap_or_default();
    match error.pos {
        (1, column) if column > 0 => format!("{text} (at character {column})"),
        (line, column) if line > 0 => format!("{text} (at {line}:{column})"),
        _ => text.to_owned(),
    }
}

/// Whether the language has a function, method or operator of this name: a call without arguments fails in another way
/// then.
fn is_known(name: &str) -> bool {
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return true;
    }
    let context = Context::with_env(Arc::clone(&ENV));
    let target = IdedExpr { id: 1, expr: Expr::Literal(LiteralValue::Null) };
    let mut targets = [None, Some(Box::new(target))].into_iter();
    targets.any(|target| {
        let call = CallExpr { func_name: name.to_owned(), target, args: Vec::new() };
        let tree = IdedExpr { id: 0, expr: Expr::Call(call) };
        !matches!(Value::resolve(&tree, &context), Err(ExecutionError::UndeclaredReference(_)))
    })
}

/// What a subscription's filter and routes make of events.
#[derive(Debug)]
pub struct Selector {
    filter: Option<Expression>,
    routes: Vec<(Expression, String)>,
    /// Of all expressions.
    patterns: Arc<Patterns>,
    /// Events that no route matches have a path, too.
    otherwise: bool,
}

/// What becomes of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// To the subscriber: to a route's path, or to the subscription's own.
    Deliver(Option<String>),
    /// Done.
    Skip,
}

/// An expression of a subscription cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {source_text:?} {reason}")]
pub struct SelectorError {
    /// `filter`, or `routes[1].match`.
    pub field: String,
    /// The route's number; none for the filter.
    pub route: Option<usize>,
    /// The expression, shortened.
    pub source_text: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Selector {
    /// Of a subscription; none where it takes everything to its own path. Takes up to some 100 ms, and is not for a
    /// thread that others wait for.
    ///
    /// # Errors
    /// The first expression that cannot be used.
    pub fn of(spec: &SubscriptionSpec) -> Result<Option<Self>, SelectorError> {
        if spec.filter.is_none() && spec.routes.is_empty() {
            return Ok(None);
        }
        let routes = spec.routes.iter().map(|route| (&*route.matches, &*route.path)).collect();
        let otherwise = spec.routes.is_empty() || !spec.path.is_empty();
        Self::compile(spec.filter.as_deref(), routes, otherwise).map(Some)
    }

    /// Only a filter.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn filter(source: &str) -> Result<Self, SelectorError> {
        Self::compile(Some(source), Vec::new(), true)
    }

    fn compile(
        filter: Option<&str>,
        routes: Vec<(&str, &str)>,
        otherwise: bool,
    ) -> Result<Self, SelectorError> {
        let mut compiler = Compiler::default();
        let compile = move || {
            let filter = filter.map(|source| compiler.compile(source, None)).transpose()?;
            let routes = routes.into_iter().enumerate().map(|(number, (source, path))| {
                Ok((compiler.compile(source, Some(number))?, path.to_owned()))
            });
            let routes = routes.collect::<Result<_, _>>()?;
            Ok(Self { filter, routes, patterns: Arc::new(compiler.patterns), otherwise })
        };
        std::thread::scope(|scope| {
            let compiling = std::thread::Builder::new()
                .name("duet-cel".to_owned())
                .stack_size(PARSER_STACK_BYTES)
                .spawn_scoped(scope, compile);
            let failed = |reason: String| refused(filter.unwrap_or_default(), None, reason);
            let compiling =
                compiling.map_err(|error| failed(format!("cannot be parsed now: {error}")))?;
            compiling.join().unwrap_or_else(|_panic| Err(failed("is not CEL".to_owned())))
        })
    }

    /// Decides on an event, and says what went wrong: an expression that cannot be evaluated does not match.
    #[must_use]
    pub fn choose(&self, event: &Event) -> (Choice, Option<String>) {
        let all = self.filter.iter().chain(self.routes.iter().map(|(expression, _)| expression));
        let wants_data = all.into_iter().any(|expression| expression.wants_data);
        let chosen = catch_unwind(AssertUnwindSafe(|| {
            let subject = Subject::new(event, wants_data, Arc::clone(&ENV), &self.patterns);
            let mut problem = None;
            let mut matches = |expression: &Expression| {
                subject.is_true(&expression.tree, expression.price).unwrap_or_else(|error| {
                    problem.get_or_insert(error);
                    false
                })
            };
            let choice = self.decide(&mut matches);
            (choice, problem)
        }));
        chosen.unwrap_or_else(|_panic| {
            (Choice::Skip, Some("the expression made the library panic".to_owned()))
        })
    }

    fn decide(&self, matches: &mut dyn FnMut(&Expression) -> bool) -> Choice {
        if self.filter.as_ref().is_some_and(|filter| !matches(filter)) {
            return Choice::Skip;
        }
        match self.routes.iter().find(|(expression, _)| matches(expression)) {
            Some((_, path)) => Choice::Deliver(Some(path.clone())),
            None if self.otherwise => Choice::Deliver(None),
            None => Choice::Skip,
        }
    }
}

/// What the expressions of one subscription share.
#[derive(Default)]
struct Compiler {
    bytes: usize,
    patterns: Patterns,
}

impl Compiler {
    fn compile(&mut self, source: &str, route: Option<usize>) -> Result<Expression, SelectorError> {
        self.bytes = self.bytes.saturating_add(source.len());
        let patterns = AssertUnwindSafe(&mut self.patterns);
        let compiled = if self.bytes > MAX_TOTAL_BYTES {
            Err(format!("makes the expressions longer than {MAX_TOTAL_BYTES} bytes together"))
        } else {
            // The library panics on some of what it cannot read.
            catch_unwind(move || Expression::compile(source, { patterns }.0))
                .unwrap_or_else(|_panic| Err("is not CEL".to_owned()))
        };
        compiled.map_err(|reason| refused(source, route, reason))
    }
}

fn refused(source: &str, route: Option<usize>, reason: String) -> SelectorError {
    SelectorError {
        field: route.map_or("filter".to_owned(), |number| format!("routes[{number}].match")),
        route,
        source_text: source.chars().take(100).collect(),
        reason,
    }
}

#[cfg(test)]
mod tests;
