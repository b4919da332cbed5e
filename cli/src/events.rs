//! `duet events`: what waits on the mesh's buses, and what an operator can do about it. Asks a control plane's
//! operator port ([`client`]); the same for every kind of bus.

mod backup;
mod client;
mod dead_letters;
mod migrate;
mod moment;
mod outbox;
mod publish;
mod show;
mod tail;

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use crate::output::{self, Format, Printing};
use client::Client;
use moment::From;

/// Says where the control plane is, unless an argument does.
const OPERATOR: &str = "DUET_OPERATOR";

/// Look at events and what waits for them, publish, replay, and deal with dead letters.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet events topics
  duet events subscriptions                           lag, what is in flight, who consumes
  duet events tail orders.placed --filter 'event.data.total > 100'
  duet events publish orders.placed '{\"total\": 12}' --type order.placed --key customer-7
  duet events dead-letters list --reason 'the last: 500'
  duet events dead-letters redrive --subscription shop/fulfil
  duet events dead-letters redrive --all --limit 10   a few first: does the repair work?
  duet events replay shop/fulfil --from 2026-01-31T12:00:00Z
  duet events pause shop/fulfil

The control plane is that of the `duet up` whose .duet folder is here or further up, else
the one on this machine's port 15016, else --operator says where it is. A time is that of
RFC 3339, in any zone, or so long ago, such as 90s or 1h30m. docs/events.md tells more.")]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
    /// The control plane's operator address, such as `http://127.0.0.1:15016`. `DUET_OPERATOR` says it as well.
    #[arg(long, global = true, value_name = "URL")]
    operator: Option<String>,
    /// State folder of a running `duet up` [default: .duet here or further up].
    #[arg(long, global = true, value_name = "DIR", conflicts_with = "operator")]
    mesh: Option<PathBuf>,
    /// The bus.
    #[arg(long, global = true, default_value = duet_api::DEFAULT_BUS)]
    bus: String,
    #[command(flatten)]
    printing: Printing,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List topics.
    Topics,
    /// List subscriptions, with what waits for each.
    Subscriptions,
    /// Show a topic's events as they come.
    Tail(tail::Args),
    /// Publish an event.
    Publish(publish::Args),
    /// List, show, move back or drop what subscribers could not handle.
    DeadLetters(dead_letters::Args),
    /// Deliver events to a subscription again, from a time or position on.
    Replay {
        /// `<namespace>/<name>`.
        subscription: String,
        /// `earliest`, `latest`, a position, a time, or so long ago, such as 1h.
        #[arg(long, value_parser = From::parse)]
        from: From,
        /// Also when events that wait come before that, and so are not delivered any more.
        #[arg(long)]
        skip_waiting: bool,
    },
    /// Hand out nothing of a subscription until it is resumed; its events wait.
    Pause {
        /// `<namespace>/<name>`.
        subscription: String,
    },
    /// Go on after a pause.
    Resume {
        /// `<namespace>/<name>`.
        subscription: String,
    },
    /// Forget a subscription that nobody declares or consumes any more.
    Forget {
        /// `<namespace>/<name>`.
        subscription: String,
        /// Also when events wait for it, which are kept for it no longer.
        #[arg(long)]
        skip_waiting: bool,
    },
    /// List, send again or drop what a sidecar accepted and its bus will never take.
    Outbox(outbox::Args),
    /// Copy everything that an embedded bus has stored into a file, while it goes on.
    Backup(backup::Args),
    /// Move what an embedded bus held to the cluster that it is on now.
    Migrate(migrate::Args),
}

/// Where it is asked, and how answers are printed.
#[derive(Debug)]
struct Session {
    client: Client,
    bus: String,
    format: Format,
}

pub(crate) fn events(args: Args) -> anyhow::Result<()> {
    let mesh = args.mesh.as_deref();
    let client = if let Action::Outbox(args) = &args.action {
        args.client(mesh)?
    } else {
        // What is said on the command line counts over the environment.
        let environment = || std::env::var(OPERATOR).ok().filter(|_| mesh.is_none());
        Client::find(args.operator.or_else(environment).as_deref(), mesh)?
    };
    let session = Session { client, bus: args.bus, format: args.printing.format() };
    match args.action {
        Action::Topics => show::topics(&session),
        Action::Subscriptions => show::subscriptions(&session),
        Action::Tail(args) => tail::tail(&session, &args),
        Action::Publish(args) => publish::publish(&session, &args),
        Action::DeadLetters(args) => dead_letters::dead_letters(&session, &args),
        Action::Replay { subscription, from, skip_waiting } => {
            replay(&session, &subscription, from, skip_waiting)
        }
        Action::Forget { subscription, skip_waiting } => {
            forget(&session, &subscription, skip_waiting)
        }
        Action::Migrate(args) => migrate::migrate(&session, &args),
        Action::Outbox(args) => outbox::outbox(&session, &args),
        Action::Backup(args) => backup::backup(&session, &args),
        Action::Pause { subscription } => pause(&session, &subscription, true),
        Action::Resume { subscription } => pause(&session, &subscription, false),
    }
}

fn replay(
    session: &Session,
    subscription: &str,
    from: From,
    skip_waiting: bool,
) -> anyhow::Result<()> {
    let body = json!({
        "bus": session.bus,
        "subscription": subscription,
        "start": from.json(),
        "skipWaiting": skip_waiting,
    });
    let answer = session.client.post("/v1/seek", &body)?;
    session.say(&answer, &format!("{subscription} goes on from {from}"))
}

fn forget(session: &Session, subscription: &str, skip_waiting: bool) -> anyhow::Result<()> {
    let body = json!({
        "bus": session.bus,
        "subscription": subscription,
        "skipWaiting": skip_waiting,
    });
    let answer = session.client.post("/v1/forget", &body)?;
    let lag = answer.get("lag").and_then(serde_json::Value::as_u64).unwrap_or(0);
    session.say(&answer, &format!("{subscription} is forgotten; {lag} events waited for it"))
}

fn pause(session: &Session, subscription: &str, paused: bool) -> anyhow::Result<()> {
    let body = json!({ "bus": session.bus, "subscription": subscription, "paused": paused });
    let answer = session.client.post("/v1/pause", &body)?;
    let state = if paused { "paused" } else { "resumed" };
    session.say(&answer, &format!("{subscription} is {state}"))
}

impl Session {
    /// The answer itself for tools, a sentence for people.
    fn say(&self, answer: &serde_json::Value, text: &str) -> anyhow::Result<()> {
        match self.format {
            Format::Text => output::answer(text),
            Format::Json => output::answer(&answer.to_string()),
        }
    }
}
