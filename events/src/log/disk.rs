//! Room on the log's disk. Events are refused before the last of it is taken, so that what is stored can go on being
//! delivered: progress and dead letters need a little of it, too. Imports [`super::LogError`].

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::LogError;

/// Left free for what must go on, or a twentieth of a disk that is small.
const RESERVE_BYTES: u64 = 64 << 20;
const RESERVE_SHARE: u64 = 20;
/// Looks again after this much went there. The log looks every second besides.
const LOOK_BYTES: u64 = 4 << 20;

/// A disk, and the log's file on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    /// What this process may still take, in bytes.
    pub(super) free: u64,
    /// All of it.
    pub(super) total: u64,
    /// What the file has taken; not its length, which runs ahead.
    pub(super) file: u64,
}

impl Usage {
    /// Of a folder and the log's file in it; `None` where nothing can be said.
    pub(super) fn of(dir: &Path, file: &Path) -> Option<Self> {
        let disk = rustix::fs::statvfs(dir).ok()?;
        let file = std::fs::metadata(file).map_or(0, |file| file.blocks() * 512);
        let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
        Some(Self { free: bytes(disk.f_bavail), total: bytes(disk.f_blocks), file })
    }

    pub(super) fn reserve(&self) -> u64 {
        RESERVE_BYTES.min(self.total / RESERVE_SHARE)
    }
}

/// Whether a copy of a log fits next to what has to go on.
pub(super) fn has_room_for_copy(dir: &Path, stored: u64) -> Result<(), LogError> {
    let Some(usage) = Usage::of(dir, dir) else {
        return Ok(());
    };
    let (wanted, free) = (usage.reserve() + stored * 2, usage.free);
    if free >= wanted {
        return Ok(());
    }
    let dir = dir.display();
    Err(LogError::Refused(format!("{dir} wants {wanted} bytes free for a copy, and has {free}")))
}

/// Tables take about half as much again as what is in them.
fn in_tables(bytes: u64) -> u64 {
    bytes / 2 * 3
}

/// Watches the disk of one log.
pub(super) struct Disk {
    look: Box<dyn FnMut() -> Option<Usage> + Send>,
    seen: Option<Usage>,
    /// Bytes that went there since.
    taken: u64,
    /// Bytes that are in the journal, and will be in the tables as well.
    unwritten: u64,
    refusing: bool,
    refusing_letters: bool,
}

impl Disk {
    /// With a way to look at it.
    pub(super) fn new(look: impl FnMut() -> Option<Usage> + Send + 'static) -> Self {
        let mut disk = Self {
            look: Box::new(look),
            seen: None,
            taken: 0,
            unwritten: 0,
            refusing: false,
            refusing_letters: false,
        };
        disk.look();
        disk
    }

    /// Looks at it.
    pub(super) fn look(&mut self) {
        self.seen = (self.look)();
        self.taken = 0;
    }

    /// So many bytes of what was taken are not in the tables yet.
    pub(super) fn expect(&mut self, unwritten: u64) {
        self.unwritten = unwritten;
    }

    /// Whether that many bytes of new events can be stored. `stored` is what the log's records take now: the file does
    /// not get shorter when some go, but takes others in their place.
    pub(super) fn takes(&mut self, bytes: u64, stored: impl FnOnce() -> u64) -> bool {
        let fits = self.fits(bytes, 1, stored);
        if fits && self.refusing {
            tracing::info!("the disk has room again: events are stored");
        } else if !fits && !self.refusing {
            let (free, reserve) = self.seen.map_or((0, 0), |seen| (seen.free, seen.reserve()));
            tracing::error!(free, reserve, "the disk is nearly full: events are refused");
        }
        self.refusing = !fits;
        fits
    }

    /// The same for a dead letter. It may have half of the reserve: where it takes the last, nothing can be settled any
    /// more, and nothing be delivered.
    pub(super) fn takes_letter(&mut self, bytes: u64, stored: impl FnOnce() -> u64) -> bool {
        let fits = self.fits(bytes, 2, stored);
        if fits && self.refusing_letters {
            tracing::info!("the disk has room again: dead letters are stored");
        } else if !fits && !self.refusing_letters {
            let free = self.seen.map_or(0, |seen| seen.free);
            tracing::error!(
                free,
                "the disk is full: what is to be a dead letter is delivered again"
            );
        }
        self.refusing_letters = !fits;
        fits
    }

    /// Whether they fit beside a part of the reserve.
    fn fits(&mut self, bytes: u64, part: u64, stored: impl FnOnce() -> u64) -> bool {
        if self.taken > LOOK_BYTES {
            self.look();
        }
        self.taken += bytes;
        let Some(usage) = self.seen else {
            return true;
        };
        let wanted = usage.reserve() / part + self.taken + in_tables(self.unwritten);
        let used = || in_tables(stored().saturating_sub(self.unwritten));
        let fits = usage.free >= wanted || usage.free + usage.file.saturating_sub(used()) >= wanted;
        if !fits {
            self.taken -= bytes;
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn disk(free: u64, file: u64) -> Disk {
        let mut left = free;
        Disk::new(move || {
            let usage = Usage { free: left, total: 1000 * MIB, file };
            left = left.saturating_sub(10 * MIB);
            Some(usage)
        })
    }

    #[test]
    fn the_reserve_is_left() {
        // 50 MiB are a twentieth.
        let mut disk = disk(56 * MIB, 0);
        assert!(disk.takes(5 * MIB, || 0), "of 6 MiB");
        assert!(!disk.takes(1, || 0), "it looked again, and 46 MiB are left");
    }

    #[test]
    fn what_only_the_journal_has_is_counted_as_it_will_be_in_the_tables() {
        let mut disk = disk(70 * MIB, 0);
        disk.expect(20 * MIB);
        assert!(!disk.takes(1, || 1 << 40), "20 MiB will take 30, and 50 are the reserve");
        disk.expect(10 * MIB);
        assert!(disk.takes(1, || 1 << 40));
    }

    #[test]
    fn dead_letters_have_half_of_the_reserve() {
        let mut disk = disk(30 * MIB, 0);
        assert!(!disk.takes(1, || 1 << 40));
        assert!(disk.takes_letter(4 * MIB, || 1 << 40));
        assert!(!disk.takes_letter(2 * MIB, || 1 << 40));
    }

    #[test]
    fn what_was_handled_makes_room_in_the_file() {
        let mut disk = disk(0, 100 * MIB);
        assert!(!disk.takes(MIB, || 60 * MIB));
        assert!(disk.takes(MIB, || 20 * MIB));
    }

    #[test]
    fn a_disk_that_cannot_be_asked_is_tried() {
        assert!(Disk::new(|| None).takes(u64::MAX / 2, || 0));
    }

    #[test]
    fn a_real_disk_has_numbers() {
        let usage = Usage::of(Path::new("."), Path::new("Cargo.toml")).unwrap();
        assert!(usage.free <= usage.total && usage.reserve() <= RESERVE_BYTES);
        assert!(usage.file > 0 && usage.file.is_multiple_of(512));
    }
}
