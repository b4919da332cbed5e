//! `duet events`: what waits on the mesh's buses, and what an operator can do about it. Asks a control plane's
//! operator port ([`client`]); the same for every kind of bus.

mod backup;
mod client;
mod dead_letters;
mod migrate;
mod outbox;
mod publish;
mod show;
mod tail;

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use crate::output::{self, Format, Printing};
use client::Client;

/// Look at events and what waits for them, publish, replay, and deal with dead letters.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet events topics
  duet events subscriptions                           lag, what is in flight, who consumes
  duet events tail orders.placed --filter 'event.data.total > 100'
  duet events publish orders.placed '{\"total\": 12}' --type order.placed --key customer-7
  duet events dead-letters list --reason 'answered 500'
  duet events dead-letters redrive --subscription shop/fulfil
  duet events replay shop/fulfil --from 2026-01-31T12:00:00Z
  duet events pause shop/fulfil

The control plane is that of the `duet up` whose .duet folder is here or further up, else the one on this
machine's port 15016, else --operator says where it is. docs/events.md tells more.")]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
    /// The control plane's operator address, such as `http://127.0.0.1:15016`.
    #[arg(long, global = true, env = "DUET_OPERATOR", value_name = "URL")]
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
        /// `earliest`, `latest`, a position, or a time as in RFC 3339.
        #[arg(long)]
        from: String,
    },
    /// Hand out nothing of a subscription until it is resumed; its events wait.
    Pause {
        /// `<namespace>/<name>`.
        subscription: String,
    },
    /// Forget a subscription that nobody declares or consumes any more; what waits for it is kept no longer.
    Forget {
        /// `<namespace>/<name>`.
        subscription: String,
    },
    /// Move what an embedded bus held to the cluster that it is on now.
    Migrate(migrate::Args),
    /// List, send again or drop what a sidecar accepted and its bus will never take.
    Outbox(outbox::Args),
    /// Copy everything that an embedded bus has stored into a file, while it goes on.
    Backup(backup::Args),
    /// Go on after a pause.
    Resume {
        /// `<namespace>/<name>`.
        subscription: String,
    },
}

/// Where it is asked, and how answers are printed.
#[derive(Debug)]
struct Session {
    client: Client,
    bus: String,
    format: Format,
}

pub(crate) fn events(args: Args) -> anyhow::Result<()> {
    let client = if let Action::Outbox(args) = &args.action {
        args.client()?
    } else {
        Client::find(args.operator.as_deref(), args.mesh.as_deref())?
    };
    let session = Session { client, bus: args.bus, format: args.printing.format() };
    match args.action {
        Action::Topics => show::topics(&session),
        Action::Subscriptions => show::subscriptions(&session),
        Action::Tail(args) => tail::tail(&session, &args),
        Action::Publish(args) => publish::publish(&session, &args),
        Action::DeadLetters(args) => dead_letters::dead_letters(&session, &args),
        Action::Replay { subscription, from } => replay(&session, &subscription, &from),
        Action::Forget { subscription } => forget(&session, &subscription),
        Action::Migrate(args) => migrate::migrate(&session, &args),
        Action::Outbox(args) => outbox::outbox(&session, &args),
        Action::Backup(args) => backup::backup(&session, &args),
        Action::Pause { subscription } => pause(&session, &subscription, true),
        Action::Resume { subscription } => pause(&session, &subscription, false),
    }
}

fn replay(session: &Session, subscription: &str, from: &str) -> anyhow::Result<()> {
    let start = match (from, from.parse::<u64>()) {
        ("earliest" | "latest", _) => json!(from),
        (_, Ok(position)) => json!({ "position": position }),
        (_, Err(_)) => json!({ "time": from }),
    };
    let body = json!({ "bus": session.bus, "subscription": subscription, "start": start });
    let answer = session.client.post("/v1/seek", &body)?;
    session.say(&answer, &format!("{subscription} goes on from {from}"))
}

fn forget(session: &Session, subscription: &str) -> anyhow::Result<()> {
    let body = json!({ "bus": session.bus, "subscription": subscription });
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
