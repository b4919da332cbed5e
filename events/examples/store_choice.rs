//! The measurement behind the choice of the embedded store: `fjall` against `redb`, each in a process of its own,
//! with 256-byte records that are flushed to disk before each acknowledgement. `README.md` keeps the table.
//!
//! `cargo run --release -p duet-events --features store-choice --example store_choice [DIR]`
//! (DIR: on the disk to measure; default: here)
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a measurement for developers: it prints, and stops where something fails"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

const RECORD: [u8; 256] = [0x5a; 256];
const RUN: Duration = Duration::from_secs(8);

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, store, phase, dir] = args.as_slice() {
        return child(store, phase, Path::new(dir));
    }
    let root = args.get(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    println!(
        "| store | load | acks/s | p50 ms | p99 ms | RSS MiB | peak MiB | disk bytes/record |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for store in ["fjall", "redb", "redb-quick-repair"] {
        for load in ["1", "256"] {
            let dir = tempfile::tempdir_in(&root).unwrap();
            for phase in [load, "reopen"] {
                let status = Command::new(std::env::current_exe().unwrap())
                    .args([store, phase])
                    .arg(dir.path())
                    .status()
                    .unwrap();
                // The loaded process ends by abort, so that the next one has to recover.
                assert!(phase != "reopen" || status.success());
            }
        }
    }
}

trait Store: Send {
    fn append(&mut self, first: u64, count: u64);
    fn count(&mut self) -> u64;
}

fn open(store: &str, dir: &Path) -> Box<dyn Store> {
    match store {
        "fjall" => Box::new(Fjall::open(dir)),
        "redb" => Box::new(Redb::open(dir, false)),
        _ => Box::new(Redb::open(dir, true)),
    }
}

struct Fjall {
    db: fjall::Database,
    events: fjall::Keyspace,
}

impl Fjall {
    fn open(dir: &Path) -> Self {
        let db = fjall::Database::builder(dir.join("fjall"))
            .cache_size(4 << 20)
            .worker_threads(1)
            .max_journaling_size(64 << 20)
            .open()
            .unwrap();
        let options = || fjall::KeyspaceCreateOptions::default().max_memtable_size(4 << 20);
        let events = db.keyspace("events", options).unwrap();
        Self { db, events }
    }
}

impl Store for Fjall {
    fn append(&mut self, first: u64, count: u64) {
        let mut batch = self.db.batch().durability(Some(fjall::PersistMode::SyncData));
        for position in first..first + count {
            batch.insert(&self.events, position.to_be_bytes(), RECORD);
        }
        batch.commit().unwrap();
    }

    fn count(&mut self) -> u64 {
        let last = self.events.last_key_value().unwrap().key().unwrap();
        u64::from_be_bytes(last.as_ref().try_into().unwrap())
    }
}

struct Redb {
    db: redb::Database,
    quick_repair: bool,
}

const EVENTS: redb::TableDefinition<'_, u64, &[u8]> = redb::TableDefinition::new("events");

impl Redb {
    fn open(dir: &Path, quick_repair: bool) -> Self {
        let db = redb::Builder::new().set_cache_size(8 << 20).create(dir.join("redb")).unwrap();
        Self { db, quick_repair }
    }
}

impl Store for Redb {
    fn append(&mut self, first: u64, count: u64) {
        let mut write = self.db.begin_write().unwrap();
        write.set_quick_repair(self.quick_repair);
        {
            let mut table = write.open_table(EVENTS).unwrap();
            for position in first..first + count {
                table.insert(position, RECORD.as_slice()).unwrap();
            }
        }
        write.commit().unwrap();
    }

    fn count(&mut self) -> u64 {
        use redb::{ReadableDatabase, ReadableTable};
        let read = self.db.begin_read().unwrap();
        read.open_table(EVENTS).unwrap().last().unwrap().unwrap().0.value()
    }
}

fn child(store: &str, phase: &str, dir: &Path) {
    let started = Instant::now();
    let mut opened = open(store, dir);
    if phase == "reopen" {
        let took = started.elapsed();
        let last = opened.count();
        println!(
            "| {store} | reopen after abort, {last} records | {:.1} ms | | | {} | {} | |",
            took.as_secs_f64() * 1e3,
            memory("VmRSS:"),
            memory("VmHWM:")
        );
        return;
    }
    let clients: usize = phase.parse().unwrap();
    // Kept open to the end: abort comes before any tidy close.
    let (acks, mut waits, _open) = load(opened, clients);
    waits.sort_unstable();
    let at = |share: usize| waits[(waits.len() - 1) * share / 100].as_secs_f64() * 1e3;
    println!(
        "| {store} | {clients} in flight | {:.0} | {:.2} | {:.2} | {} | {} | {:.0} |",
        acks as f64 / RUN.as_secs_f64(),
        at(50),
        at(99),
        memory("VmRSS:"),
        memory("VmHWM:"),
        disk_bytes(dir) as f64 / acks as f64,
    );
    std::process::abort();
}

/// Clients that each wait for their acknowledgement before the next record, and one committer that takes all that
/// queued, writes one batch, flushes once and answers all.
fn load(mut store: Box<dyn Store>, clients: usize) -> (u64, Vec<Duration>, Box<dyn Store>) {
    let (queue, mut queued) = mpsc::channel::<oneshot::Sender<()>>(clients);
    let committer = std::thread::spawn(move || {
        let mut next = 1;
        let mut group = Vec::new();
        while queued.blocking_recv_many(&mut group, clients) > 0 {
            store.append(next, group.len() as u64);
            next += group.len() as u64;
            for waiter in group.drain(..) {
                waiter.send(()).unwrap();
            }
        }
        (store, next - 1)
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let started = Instant::now();
    let waits = runtime.block_on(async move {
        let clients = (0..clients).map(|_| {
            let queue = queue.clone();
            tokio::spawn(async move {
                let mut waits = Vec::new();
                while started.elapsed() < RUN {
                    let asked = Instant::now();
                    let (answer, answered) = oneshot::channel();
                    queue.send(answer).await.unwrap();
                    answered.await.unwrap();
                    waits.push(asked.elapsed());
                }
                waits
            })
        });
        let clients: Vec<_> = clients.collect();
        drop(queue);
        let mut all = Vec::new();
        for client in clients {
            all.extend(client.await.unwrap());
        }
        all
    });
    let (store, acks) = committer.join().unwrap();
    (acks, waits, store)
}

fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// What the files really take.
fn disk_bytes(dir: &Path) -> u64 {
    let out = Command::new("du").args(["-s", "-B1"]).arg(dir).output().unwrap();
    String::from_utf8(out.stdout).unwrap().split_whitespace().next().unwrap().parse().unwrap()
}
