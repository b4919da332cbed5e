//! Batches that are in the journal and not in the tables yet.

use super::super::record::Place;
use super::{Batch, Found};

/// In their order.
#[derive(Debug, Default)]
pub(super) struct Pending {
    batches: Vec<(Span, Batch)>,
    bytes: usize,
}

/// The lowest and the highest place that a batch changes, so that most need not be looked into.
type Span = (Place, Place);

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    pub(super) fn push(&mut self, batch: Batch) {
        self.bytes += batch.event_bytes();
        self.batches.push((span(&batch), batch));
    }

    /// Bytes of all events.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn batches(&self) -> impl Iterator<Item = &Batch> {
        self.batches.iter().map(|(_span, batch)| batch)
    }

    /// What they make of a place, if they say anything about it.
    pub(super) fn find(&self, place: Place) -> Option<Found> {
        self.near(place).find_map(|batch| batch.find(place))
    }

    /// The end of a range around a place that they remove.
    pub(super) fn removed_until(&self, place: Place) -> Option<u64> {
        self.near(place).find_map(|batch| batch.removed_until(place))
    }

    /// Those that may say something about a place, the newest first.
    fn near(&self, place: Place) -> impl Iterator<Item = &Batch> {
        let batches = self.batches.iter().rev();
        let near = batches.filter(move |((low, high), _)| (low..=high).contains(&&place));
        near.map(|(_span, batch)| batch)
    }

    /// The lowest position from a place on that they put something at, before the position `end` of the same topic.
    pub(super) fn first(&self, from: Place, end: u64) -> Option<u64> {
        let events = self.batches().flat_map(|batch| &batch.events);
        let mut places = events.map(|(place, _record)| *place);
        places.find(|place| (from..(from.0, end)).contains(place)).map(|place| place.1)
    }
}

fn span(batch: &Batch) -> Span {
    let events = batch.events.iter().map(|(place, _record)| (*place, *place));
    let trims = batch.trims.iter().map(|(topic, at)| ((*topic, at.start), (*topic, at.end)));
    let nothing = ((u32::MAX, u64::MAX), (0, 0));
    events.chain(trims).fold(nothing, |all, one| (all.0.min(one.0), all.1.max(one.1)))
}
