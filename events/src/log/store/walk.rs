//! Reading many events in a row, also where some of the pages are damaged.

use std::collections::BTreeMap;
use std::ops::Range;

use prost::Message as _;
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable as _};

use super::super::LogError;
use super::super::record::{Place, TopicRow};
use super::reader::readable;
use super::{EVENTS, TOPICS};

/// Rows and bytes that are read together.
const ROWS: usize = 256;
const BYTES: usize = 1 << 20;

/// Goes from one place to another. Where there is damage it goes on position by position, and ends with the topic.
pub(super) struct Walk {
    events: ReadOnlyTable<Place, &'static [u8]>,
    /// Positions of each topic that may have an event.
    bounds: BTreeMap<u32, Range<u64>>,
    next: Place,
    to: Place,
    damaged: u64,
}

/// An event as it is stored.
pub(super) type Row = (Place, Vec<u8>);

impl Walk {
    pub(super) fn new(read: &ReadTransaction, from: Place, to: Place) -> Result<Self, LogError> {
        let mut bounds = BTreeMap::new();
        for row in read.open_table(TOPICS)?.iter()? {
            if let Ok(topic) = TopicRow::decode(row?.1.value()) {
                bounds.insert(topic.id, topic.first..topic.next);
            }
        }
        Ok(Self { events: read.open_table(EVENTS)?, bounds, next: from, to, damaged: 0 })
    }

    /// How many positions could not be read.
    pub(super) fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Some of the next rows, and no more than `limit`; none: that is the end.
    pub(super) fn rows(&mut self, limit: usize) -> Result<Vec<Row>, LogError> {
        while self.next < self.to {
            let mut rows = Vec::new();
            let whole = readable(|| {
                let mut bytes = 0;
                for row in self.events.range(self.next..self.to)?.take(limit.min(ROWS)) {
                    let (place, frame) = row?;
                    bytes += frame.value().len();
                    rows.push((place.value(), frame.value().to_vec()));
                    if bytes >= BYTES {
                        break;
                    }
                }
                Ok(())
            })?;
            if let Some(((topic, position), _)) = rows.last() {
                self.next = (*topic, position.saturating_add(1));
                return Ok(rows);
            }
            if whole.is_some() {
                break;
            }
            if let Some(row) = self.step()? {
                return Ok(vec![row]);
            }
        }
        Ok(Vec::new())
    }

    /// Looks at the next position alone. After a topic's last one comes the next topic.
    fn step(&mut self) -> Result<Option<Row>, LogError> {
        let place @ (topic, position) = self.next;
        let bounds = self.bounds.get(&topic).filter(|bounds| position < bounds.end);
        let Some(bounds) = bounds else {
            let mut later = self.bounds.iter().filter(|(other, _)| **other > topic);
            self.next = later.next().map_or(self.to, |(topic, bounds)| (*topic, bounds.start));
            return Ok(None);
        };
        if position < bounds.start {
            self.next = (topic, bounds.start);
            return Ok(None);
        }
        self.next = (topic, position.saturating_add(1));
        let found = readable(|| {
            let frame = self.events.get(place)?;
            Ok(frame.map(|frame| frame.value().to_vec()))
        })?;
        self.damaged += u64::from(found.is_none());
        Ok(found.flatten().map(|frame| (place, frame)))
    }
}
