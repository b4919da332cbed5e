//! Every charge that was made, by idempotency key. Imports [`crate::journal`].

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::journal::Fold;

/// A charge that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Receipt {
    /// The request's idempotency key.
    pub(crate) key: String,
    /// Our own name for the charge.
    pub(crate) charge: String,
    pub(crate) order: String,
    pub(crate) amount_cents: u64,
    pub(crate) at_ms: u64,
}

/// All charges. Of two lines with one key the first in the file is the charge and the other is nothing, so
/// attempts that run at the same moment charge once.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    receipts: HashMap<String, Receipt>,
    pub(crate) amount_cents: u64,
}

impl Ledger {
    pub(crate) fn receipt(&self, key: &str) -> Option<Receipt> {
        self.receipts.get(key).cloned()
    }

    pub(crate) fn charges(&self) -> usize {
        self.receipts.len()
    }
}

impl Fold for Ledger {
    type Line = Receipt;

    fn apply(&mut self, receipt: Receipt) {
        let amount_cents = receipt.amount_cents;
        if let std::collections::hash_map::Entry::Vacant(free) =
            self.receipts.entry(receipt.key.clone())
        {
            free.insert(receipt);
            self.amount_cents = self.amount_cents.saturating_add(amount_cents);
        }
    }
}
