//! One hub for each consumed subscription: it pulls from JetStream what its consumers have room for, hands it out,
//! tells JetStream that it is still being worked on, and passes on what became of it.
//!
//! An event that is held is known to JetStream as handed out; a hub that dies costs a wait of `ACK_WAIT` and nothing
//! else. Retries of an unordered subscription wait in JetStream, those of an ordered one in the hub, before the later
//! events of their key.

mod hand_out;
mod place;
mod pull;
mod question;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_nats::Subject;
use async_nats::jetstream::{AckKind, Message};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until};

use super::held::{Hands, Stage};
use super::settle;
use super::shared::Shared;
use super::stream::Topic;
use super::subscription::PullConsumer;
use crate::bus::{ConsumeError, Delivery, Settle, SubscriptionSpec};
use place::Doubt;
use pull::next_message;
use question::Question;

/// How often JetStream hears of what is held.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Wait after something failed.
const PAUSE: Duration = Duration::from_millis(500);
/// Handled positions that are remembered, for acknowledgements that JetStream never got.
const REMEMBERED: usize = 4096;

/// What a hub is told.
pub(super) enum Command {
    /// A consumer comes.
    Join { member: u64, credit: usize, out: Deliveries, joined: oneshot::Sender<()> },
    /// A delivery is decided.
    Settle { member: u64, delivery: u64, outcome: Settle },
    /// A consumer wants nothing more, and still settles what it has.
    Retire { member: u64 },
    /// A consumer goes.
    Leave { member: u64 },
    /// The place of the subscription changed.
    Moved,
    /// When its consumer was made, and whether it is paused, as somebody saw it.
    Seen { born: String, paused: bool },
    /// Nothing is handed out, or again.
    Paused(bool),
    /// How many consumers there are.
    Count(oneshot::Sender<usize>),
    /// Ends every consumer.
    End(String),
}

pub(super) type Deliveries = mpsc::Sender<Result<Delivery, ConsumeError>>;

struct Member {
    credit: usize,
    out: Deliveries,
    /// Position of each open delivery, by its id, and the turn that it is of.
    open: HashMap<u64, (u64, u64)>,
}

/// What came of a write.
pub(super) enum Done {
    /// Attempts spent so far are known.
    Spent { position: u64, spent: u32 },
    /// They are not known yet.
    Unknown { position: u64 },
    /// JetStream may forget the event: it is acknowledged.
    Handled { position: u64 },
    /// It is acknowledged or given back already.
    Gone { position: u64 },
    /// It is to be handed out again, at once or later.
    Again { position: u64, delay: Duration },
    /// How many events JetStream waits to hear of.
    Pending(Option<usize>),
    /// Whether JetStream has the subscription paused.
    Paused(bool),
    /// When the consumer was made that these come from; `None` where nobody can tell.
    Born { born: Option<String>, messages: Vec<Message> },
}

/// Waits, before the first delivery of an ordered subscription, until everything that was handed out before is here:
/// an event that another process had must not be overtaken.
struct Barrier {
    until: Instant,
    asking: bool,
}

pub(super) struct Hub {
    pub(super) shared: Arc<Shared>,
    pub(super) spec: SubscriptionSpec,
    pub(super) topic: Topic,
    commands: mpsc::UnboundedReceiver<Command>,
    members: HashMap<u64, Member>,
    /// There was a consumer: without one it is over.
    joined: bool,
    hands: Hands,
    consumer: Option<PullConsumer>,
    /// When the consumer was made: another one starts anew.
    born: String,
    /// How often the subscription was moved before that.
    generation: u64,
    /// What it had handed out, to anybody, with the last message that came.
    newest: u64,
    doubt: Doubt,
    question: Option<Question>,
    /// The next event is larger than what was asked for.
    any_size: bool,
    /// Each with the turn that it is of.
    work: FuturesUnordered<BoxFuture<'static, (u64, Done)>>,
    /// Counts how often everything held became void: what comes of it then is of no interest.
    turn: u64,
    barrier: Option<Barrier>,
    /// No pull before.
    rest_until: Instant,
    next_delivery: u64,
    handled: (VecDeque<u64>, HashSet<u64>),
    paused: bool,
    over: Option<String>,
}

impl Hub {
    pub(super) fn new(
        shared: Arc<Shared>,
        spec: SubscriptionSpec,
        topic: Topic,
        commands: mpsc::UnboundedReceiver<Command>,
    ) -> Self {
        Self {
            shared,
            spec,
            topic,
            commands,
            members: HashMap::new(),
            joined: false,
            hands: Hands::default(),
            consumer: None,
            born: String::new(),
            generation: 0,
            newest: 0,
            doubt: Doubt::default(),
            question: None,
            any_size: false,
            work: FuturesUnordered::new(),
            turn: 0,
            barrier: None,
            rest_until: Instant::now(),
            next_delivery: 0,
            handled: Default::default(),
            paused: false,
            over: None,
        }
    }

    /// Works until the last consumer has left.
    pub(super) async fn run(mut self) {
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut signals = (self.shared.connects.clone(), self.shared.closed.subscribe());
        // Of the connection that is there it has nothing to lose.
        signals.0.mark_unchanged();
        if *signals.1.borrow() {
            self.over = Some("the bus is closed".to_owned());
        }
        while self.over.is_none() && !(self.joined && self.members.is_empty()) {
            self.hand_out();
            self.pull().await;
            self.step(&mut heartbeat, &mut signals.0, &mut signals.1).await;
        }
        Box::pin(self.finish()).await;
    }

    /// Takes in the next thing that happens.
    async fn step(
        &mut self,
        heartbeat: &mut Interval,
        connects: &mut watch::Receiver<u64>,
        closed: &mut watch::Receiver<bool>,
    ) {
        let wake = self.hands.wake(Instant::now());
        let wake = wake.into_iter().chain(self.pull_at()).min();
        let wake = wake.unwrap_or_else(|| Instant::now() + HEARTBEAT);
        tokio::select! {
            command = self.commands.recv() => self.command(command).await,
            pulled = next_message(&mut self.question) => self.pulled(pulled).await,
            Some((turn, done)) = self.work.next(), if !self.work.is_empty() => self.done(turn, done).await,
            _ = heartbeat.tick() => self.still_working().await,
            _ = connects.changed() => self.reconnected(),
            _ = closed.changed() => self.over = Some("the bus is closed".to_owned()),
            () = sleep_until(wake) => {}
        }
    }

    /// Pulls that the old connection made are lost, and with them what came to nobody: where order is kept, that must not
    /// be overtaken, see [`Barrier`].
    fn reconnected(&mut self) {
        self.question = None;
        self.consumer = None;
        self.rest_until = Instant::now();
    }

    /// Gives everything back, in order, and ends who is left.
    async fn finish(mut self) {
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            // What was decided before counts.
            if matches!(command, Command::Settle { .. }) {
                self.command(Some(command)).await;
            }
        }
        let late = self.end_question().await;
        while let Ok(Some((turn, done))) = tokio::time::timeout(PAUSE, self.work.next()).await {
            self.done(turn, done).await;
        }
        self.give_back(late).await;
        let reason = self.over.take().unwrap_or_else(|| "the bus ended this consumer".to_owned());
        for (_, member) in self.members.drain() {
            let bus = self.spec.bus.clone();
            let over = ConsumeError::Unavailable { bus, reason: reason.clone() };
            // It has room for the end besides its credit.
            member.out.try_send(Err(over)).unwrap_or_default();
        }
    }

    async fn command(&mut self, command: Option<Command>) {
        let Some(command) = command else {
            self.over = Some("the bus is gone".to_owned());
            return;
        };
        match command {
            Command::Join { member, credit, out, joined } => {
                let open = HashMap::with_capacity(credit);
                self.joined = true;
                self.members.insert(member, Member { credit, out, open });
                if joined.send(()).is_err() {
                    self.members.remove(&member);
                }
            }
            Command::Settle { member, delivery, outcome } => {
                let open = self.members.get_mut(&member);
                if let Some((turn, position)) =
                    open.and_then(|member| member.open.remove(&delivery))
                    && turn == self.turn
                    && self.hands.get(position).is_some_and(|h| h.stage == Stage::Out(member))
                {
                    self.settle(position, outcome).await;
                }
            }
            Command::Retire { member } => {
                if let Some(member) = self.members.get_mut(&member) {
                    member.credit = 0;
                }
            }
            Command::Leave { member } => {
                self.members.remove(&member);
                self.hands.take_back(member);
            }
            Command::Moved => self.look_again().await,
            Command::Seen { born, paused } => {
                let found = !self.born.is_empty();
                if found && (born, paused) != (self.born.clone(), self.paused) {
                    self.look_again().await;
                }
            }
            Command::Paused(paused) => self.paused = paused,
            Command::Count(answer) => answer.send(self.members.len()).unwrap_or_default(),
            Command::End(reason) => self.over = Some(reason),
        }
    }

    async fn settle(&mut self, position: u64, outcome: Settle) {
        let Some(held) = self.hands.get_mut(position) else { return };
        let (reply, attempt) = (held.reply.clone(), held.attempt);
        match outcome {
            Settle::Ack if attempt == 1 && !self.spec.once => {
                self.shared.answer(reply, AckKind::Ack).await;
                self.forget(position);
            }
            Settle::Release { delay } if delay.is_zero() => self.hands.set(position, Stage::Ready),
            Settle::Release { delay } if self.spec.ordered => {
                self.hands.set(position, Stage::From(Instant::now() + delay));
            }
            Settle::Release { delay } => {
                self.hands.remove(position);
                self.shared.answer(reply, AckKind::Nak(Some(delay))).await;
            }
            Settle::Ack | Settle::Retry { .. } | Settle::DeadLetter { .. } => {
                if matches!(outcome, Settle::Retry { .. }) {
                    held.attempt = attempt.saturating_add(1);
                }
                let event = held.event.clone();
                self.hands.set(position, Stage::Busy);
                self.write(settle::Job { attempt, ..self.job(position, reply) }, event, outcome);
            }
        }
    }

    async fn done(&mut self, turn: u64, done: Done) {
        if let Done::Born { born, messages } = done {
            return self.no_doubt(born, messages).await;
        }
        if turn != self.turn {
            return;
        }
        match done {
            Done::Born { .. } => {}
            Done::Spent { position, spent } => {
                if let Some(held) = self.hands.get_mut(position)
                    && matches!(held.stage, Stage::Asking | Stage::Busy)
                {
                    held.attempt = spent.saturating_add(1);
                    self.hands.set(position, Stage::Ready);
                }
            }
            Done::Unknown { position } => self.ask_on(position),
            Done::Handled { position } => self.forget(position),
            Done::Gone { position } => drop(self.hands.remove(position)),
            Done::Again { position, delay } if delay.is_zero() => {
                self.hands.set(position, Stage::Ready);
            }
            Done::Again { position, delay } => {
                self.hands.set(position, Stage::From(Instant::now() + delay));
            }
            Done::Paused(paused) => self.paused = paused,
            Done::Pending(pending) => {
                let complete = pending.is_some_and(|pending| pending <= self.hands.len());
                if let Some(barrier) = &mut self.barrier {
                    barrier.asking = false;
                    if complete || Instant::now() >= barrier.until {
                        self.barrier = None;
                    }
                }
            }
        }
    }

    /// The event is handled; should JetStream not have heard it, it hears it again.
    fn forget(&mut self, position: u64) {
        self.hands.remove(position);
        let (order, known) = &mut self.handled;
        if known.insert(position) {
            order.push_back(position);
        }
        if order.len() > REMEMBERED
            && let Some(oldest) = order.pop_front()
        {
            known.remove(&oldest);
        }
    }

    fn job(&self, position: u64, reply: Subject) -> settle::Job {
        settle::Job {
            shared: Arc::clone(&self.shared),
            spec: self.spec.clone(),
            position,
            attempt: 1,
            reply,
            born: self.born.clone(),
        }
    }

    fn write(&self, job: settle::Job, event: crate::cloudevent::Event, outcome: Settle) {
        self.work(job.run(event, outcome));
    }

    /// Does something beside everything else.
    fn work(&self, work: impl Future<Output = Done> + Send + 'static) {
        let turn = self.turn;
        self.work.push(Box::pin(async move { (turn, work.await) }));
    }
}

/// Milliseconds since the epoch.
pub(super) fn now_ms() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0)
}
