//! Which rows are published, in which order: pure.

use std::collections::{BTreeMap, BTreeSet};

use duet_events::Event;

use crate::excluded::Excluded;
use crate::row::{Row, RowError, RowKey};
use crate::spec::SourceSpec;

/// Bytes of one publish; an event that is larger goes alone.
const GROUP_BYTES: usize = 1 << 20;

/// A row that becomes an event.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) row: RowKey,
    /// Its partition key.
    pub(crate) key: Option<String>,
    pub(crate) event: Event,
}

/// Rows that are one publish.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Group {
    pub(crate) items: Vec<Item>,
    bytes: usize,
}

/// A row that cannot be published.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bad {
    pub(crate) sequence: i64,
    /// As far as there is one.
    pub(crate) id: String,
    pub(crate) key: Option<String>,
    pub(crate) error: RowError,
}

/// What to do with the rows of one read.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// By topic, in the order of the table: groups, each one publish.
    pub(crate) topics: BTreeMap<String, Vec<Group>>,
    pub(crate) bad: Vec<Bad>,
}

/// Sorts rows by topic, and leaves out what is no event and what would overtake that.
pub(crate) fn plan(rows: Vec<Row>, spec: &SourceSpec) -> Plan {
    let mut plan = Plan::default();
    let mut held = BTreeSet::new();
    for row in rows {
        let key = row.key.clone();
        if key.as_ref().is_some_and(|key| held.contains(key)) {
            continue;
        }
        let (sequence, id) = (row.sequence, row.id.clone().unwrap_or_default());
        match row.event(spec) {
            Ok((topic, event)) => {
                let item = Item { row: RowKey { sequence, id }, key, event };
                add(plan.topics.entry(topic).or_default(), item);
            }
            Err(error) => {
                held.extend(key.clone());
                plan.bad.push(Bad { sequence, id, key, error });
            }
        }
    }
    plan
}

fn add(groups: &mut Vec<Group>, item: Item) {
    let bytes = item.event.size();
    match groups.last_mut().filter(|group| group.bytes + bytes <= GROUP_BYTES) {
        Some(group) => {
            group.bytes += bytes;
            group.items.push(item);
        }
        None => groups.push(Group { items: vec![item], bytes }),
    }
}

impl Excluded {
    /// Leaves a bad row out, and what must not overtake it.
    pub(crate) fn add(&mut self, bad: &Bad) {
        self.rows.insert(bad.sequence);
        self.keys.extend(bad.key.clone());
    }
}

#[cfg(test)]
mod tests {
    use duet_api::proto;

    use super::*;

    fn spec() -> SourceSpec {
        let raw = proto::OutboxSource {
            name: "a/b".to_owned(),
            database: Some(proto::outbox_source::Database::Url("sqlite:a".to_owned())),
            table: "outbox".to_owned(),
            bus: "default".to_owned(),
            source: "/a/b".to_owned(),
            ..proto::OutboxSource::default()
        };
        raw.try_into().unwrap()
    }

    /// `sequence:topic:key`; a topic of two words is a bad one.
    fn rows(text: &str) -> Vec<Row> {
        text.split(", ")
            .map(|row| {
                let mut parts =
                    row.split(':').map(|part| Some(part.to_owned()).filter(|p| !p.is_empty()));
                let id = parts.next().unwrap();
                Row {
                    sequence: id.as_ref().unwrap().parse().unwrap(),
                    id,
                    topic: parts.next().unwrap(),
                    key: parts.next().unwrap(),
                    event_type: Some("t".to_owned()),
                    ..Row::default()
                }
            })
            .collect()
    }

    fn sequences(groups: &[Group]) -> Vec<Vec<i64>> {
        let of = |group: &Group| group.items.iter().map(|item| item.row.sequence).collect();
        groups.iter().map(of).collect()
    }

    #[test]
    fn rows_keep_their_order_in_each_topic() {
        let plan = plan(rows("1:a:, 2:b:k, 3:a:k, 4:b:"), &spec());
        assert_eq!(sequences(&plan.topics["a"]), [[1, 3]]);
        assert_eq!(sequences(&plan.topics["b"]), [[2, 4]]);
        assert!(plan.bad.is_empty());
    }

    #[test]
    fn a_bad_row_holds_back_its_own_key_only() {
        let plan = plan(rows("1:a:k, 2:no no:k, 3:a:k, 4:b:k, 5:a:other, 6:no no:, 7:a:"), &spec());
        assert_eq!(sequences(&plan.topics["a"]), [[1, 5, 7]]);
        assert_eq!(plan.topics.len(), 1);
        let bad: Vec<i64> = plan.bad.iter().map(|bad| bad.sequence).collect();
        assert_eq!(bad, [2, 6]);
        let mut excluded = Excluded::default();
        plan.bad.iter().for_each(|bad| excluded.add(bad));
        assert_eq!(excluded.rows, BTreeSet::from([2, 6]));
        assert_eq!(excluded.keys, BTreeSet::from(["k".to_owned()]));
    }

    #[test]
    fn groups_are_bounded_in_bytes() {
        let mut large = rows("1:a:, 2:a:, 3:a:, 4:a:");
        for row in &mut large {
            row.data = Some(vec![b'x'; 400 << 10]);
        }
        large[2].data = Some(vec![b'x'; 2 << 20]);
        let plan = plan(large, &spec());
        assert_eq!(sequences(&plan.topics["a"]), [vec![1, 2], vec![3], vec![4]]);
    }
}
