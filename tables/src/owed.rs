//! Rows that the bus has, and that the table may still have: they are to be deleted or marked, and not published again.
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::row::{Row, RowKey, Settled};

/// Most tries of which the end is not known that are remembered; past it, the oldest are forgotten.
const MOST_TRIED: usize = 4096;

/// What the bus has, by sequence. It outlives a connection: whatever keeps the rows from being settled, they are
/// published once.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    rows: BTreeMap<i64, Owing>,
}

#[derive(Debug, PartialEq)]
struct Owing {
    id: String,
    standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// Not settled yet: the database failed before, or the application has the row locked.
    Due,
    /// The database settled fewer rows than it was told, without an error. Either the application has removed the row
    /// itself, or something keeps it: the next read shows which.
    Doubtful,
}

/// A row that the database said nothing against settling, and that is still there.
#[derive(Debug, PartialEq)]
pub(crate) struct Kept {
    pub(crate) row: RowKey,
}

impl Owed {
    /// The bus has these.
    pub(crate) fn add(&mut self, rows: &[RowKey]) {
        for row in rows {
            let owing = Owing { id: row.id.clone(), standing: Standing::Due };
            self.rows.insert(row.sequence, owing);
        }
    }

    /// What is to be settled.
    pub(crate) fn due(&self) -> Vec<RowKey> {
        let due = self.rows.iter().filter(|(_, owing)| owing.standing == Standing::Due);
        due.map(|(sequence, owing)| RowKey { sequence: *sequence, id: owing.id.clone() }).collect()
    }

    /// What the database made of these.
    pub(crate) fn settle(&mut self, rows: &[RowKey], settled: &Settled) {
        let locked: BTreeSet<i64> = settled.locked.iter().map(|row| row.sequence).collect();
        let told = rows.len().saturating_sub(locked.len());
        let all = u64::try_from(told).is_ok_and(|told| told <= settled.rows);
        for row in rows.iter().filter(|row| !locked.contains(&row.sequence)) {
            if all {
                self.rows.remove(&row.sequence);
            } else if let Some(owing) = self.rows.get_mut(&row.sequence) {
                owing.standing = Standing::Doubtful;
            }
        }
    }

    /// Whether the next read has something to show, so that it must not wait for a change.
    pub(crate) fn in_doubt(&self) -> bool {
        self.rows.values().any(|owing| owing.standing == Standing::Doubtful)
    }

    /// Takes what the bus has out of a read. `seen` is the last place that the read showed, or `None` where it does not
    /// show everything before.
    ///
    /// # Errors
    /// When it has a row that should be gone. That one is to be settled again.
    pub(crate) fn sift(&mut self, rows: &mut Vec<Row>, seen: Option<i64>) -> Result<(), Kept> {
        let mut kept = None;
        let mut still = BTreeSet::new();
        rows.retain(|row| {
            let Some(owing) = self.rows.get_mut(&row.sequence) else { return true };
            if !row.is(row.sequence, &owing.id) {
                return true;
            }
            if owing.standing == Standing::Doubtful && kept.is_none() {
                kept = Some(RowKey { sequence: row.sequence, id: owing.id.clone() });
            }
            owing.standing = Standing::Due;
            still.insert(row.sequence);
            false
        });
        let gone = |sequence: i64| seen.is_some_and(|seen| sequence <= seen);
        self.rows.retain(|sequence, owing| {
            owing.standing == Standing::Due || still.contains(sequence) || !gone(*sequence)
        });
        kept.map_or(Ok(()), |row| Err(Kept { row }))
    }
}

/// Rows that the bus may have, because publishing them failed: that it knows them is no surprise.
#[derive(Debug, Default)]
pub(crate) struct Tried {
    rows: BTreeSet<(i64, String)>,
}

impl Tried {
    pub(crate) fn add(&mut self, rows: &[RowKey]) {
        self.rows.extend(rows.iter().map(|row| (row.sequence, row.id.clone())));
        while self.rows.len() > MOST_TRIED {
            self.rows.pop_first();
        }
    }

    /// Whether it is one of them, which it is no longer.
    pub(crate) fn take(&mut self, row: &RowKey) -> bool {
        !self.rows.is_empty() && self.rows.remove(&(row.sequence, row.id.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(sequences: &[i64]) -> Vec<RowKey> {
        sequences.iter().map(|i| RowKey { sequence: *i, id: format!("e{i}") }).collect()
    }

    fn rows(sequences: &[i64]) -> Vec<Row> {
        let row = |i: &i64| Row { sequence: *i, id: Some(format!("e{i}")), ..Row::default() };
        sequences.iter().map(row).collect()
    }

    /// Owed are 1 to 3, of which the database settled so many.
    fn owed(count: u64, locked: &[i64]) -> Owed {
        let mut owed = Owed::default();
        owed.add(&keys(&[1, 2, 3]));
        let settled = Settled { rows: count, locked: keys(locked) };
        owed.settle(&keys(&[1, 2, 3]), &settled);
        owed
    }

    /// What a read is after it was sifted.
    fn sift(owed: &mut Owed, read: &[i64], seen: Option<i64>) -> Result<Vec<i64>, i64> {
        let mut rows = rows(read);
        match owed.sift(&mut rows, seen) {
            Ok(()) => Ok(rows.iter().map(|row| row.sequence).collect()),
            Err(kept) => Err(kept.row.sequence),
        }
    }

    #[test]
    fn what_is_settled_is_forgotten() {
        let mut owed = owed(3, &[]);
        assert!(!owed.in_doubt() && owed.due().is_empty());
        assert_eq!(sift(&mut owed, &[1, 4], Some(i64::MAX)), Ok(vec![1, 4]));
    }

    #[test]
    fn a_row_that_is_still_there_is_named_and_due_again() {
        let mut owed = owed(1, &[]);
        assert!(owed.in_doubt() && owed.due().is_empty());
        assert_eq!(sift(&mut owed, &[2, 4], Some(i64::MAX)), Err(2));
        assert_eq!(owed.due(), keys(&[2]));
        assert!(!owed.in_doubt());
    }

    #[test]
    fn rows_that_the_application_removed_are_no_trouble() {
        let mut owed = owed(1, &[]);
        assert_eq!(sift(&mut owed, &[4], None), Ok(vec![4]), "it shows nothing of them");
        assert!(owed.in_doubt());
        assert_eq!(sift(&mut owed, &[4], Some(4)), Ok(vec![4]));
        assert!(!owed.in_doubt() && owed.due().is_empty());
    }

    #[test]
    fn locked_rows_stay_due_and_are_not_published_again() {
        let mut owed = owed(2, &[2]);
        assert!(!owed.in_doubt());
        assert_eq!(owed.due(), keys(&[2]));
        assert_eq!(sift(&mut owed, &[2, 4], Some(i64::MAX)), Ok(vec![4]));
        assert_eq!(owed.due(), keys(&[2]));
    }

    #[test]
    fn another_row_in_the_place_of_one_is_published() {
        let mut owed = owed(0, &[]);
        let mut rows = rows(&[2]);
        rows[0].id = Some("new".to_owned());
        assert_eq!(owed.sift(&mut rows, Some(i64::MAX)), Ok(()));
        assert_eq!(rows.len(), 1);
        assert!(!owed.in_doubt());
    }

    #[test]
    fn tries_are_forgotten_past_a_bound() {
        let mut tried = Tried::default();
        let many: Vec<i64> = (0..=MOST_TRIED as i64).collect();
        tried.add(&keys(&many));
        assert!(!tried.take(&keys(&[0])[0]) && tried.take(&keys(&[1])[0]));
        assert!(!tried.take(&keys(&[1])[0]));
    }
}
