//! Writing to the tables what only the journal has, when the store is opened.

use super::super::LogError;
use super::{Batch, Store};

impl Store {
    /// Puts batches into the tables, without a flush. Returns the store, and how many could not be put: where tables are
    /// damaged, those that would go there are given up, as otherwise the log would never open again. But what a batch
    /// removes is given up first: the rest of it may be events that were acknowledged.
    ///
    /// After each that fails the store is opened anew, and begins again: memory may be damaged as well.
    pub(super) fn replay(
        mut self,
        mut batches: Vec<Batch>,
        open: impl Fn() -> Result<Self, LogError>,
    ) -> Result<(Self, u64), LogError> {
        let mut lost = 0;
        if batches.is_empty() || self.takes(&batches)? {
            return Ok((self, lost));
        }
        loop {
            // Closed before it is opened.
            drop(self);
            self = open()?;
            let Some(failed) = self.first_refused(&batches)? else {
                return Ok((self, lost));
            };
            match batches.get_mut(failed) {
                Some(batch) if !batch.trims.is_empty() => batch.trims.clear(),
                _ => {
                    batches.remove(failed);
                    lost += 1;
                }
            }
        }
    }

    fn first_refused(&self, batches: &[Batch]) -> Result<Option<usize>, LogError> {
        for (number, batch) in batches.iter().enumerate() {
            if !self.takes(std::slice::from_ref(batch))? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// Puts batches. False: it cannot be done, and nothing is written any more. What is wrong with all of the file fails
    /// the next commit as well.
    fn takes(&self, batches: &[Batch]) -> Result<bool, LogError> {
        match self.put(batches) {
            Ok(()) => Ok(true),
            Err(LogError::Store(reason)) => {
                tracing::error!(reason, "a part of the journal does not go into the tables");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
