//! Maglev hashing (Eisenbud et al., NSDI 2016, section 3.4): the same endpoint for the same key, spread evenly, with little
//! change when endpoints come and go.

use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};

/// Entries of a table. It does not depend on the number of endpoints, or one more of them would move every key. The more
/// entries there are, the fewer keys move besides those that have to: about 3 N^2 / `SIZE` of these, so as many again
/// with 200 endpoints.
const SIZE: usize = 1 << BITS;
const BITS: u32 = 17;

/// Which endpoint each part of the key space belongs to.
#[derive(Debug, Default)]
pub struct Table(Vec<u32>);

impl Table {
    /// A table for endpoints of these names; only names count, not their order.
    #[must_use]
    pub fn new(names: &[String]) -> Self {
        if names.is_empty() {
            return Self::default();
        }
        // In the order of names, so that every sidecar has the same table.
        let mut order: Vec<usize> = (0..names.len()).collect();
        order.sort_by_key(|index| names.get(*index));
        let mut walks: Vec<Walk> = order
            .iter()
            .map(|index| Walk::new(*index, names.get(*index).map_or("", String::as_str)))
            .collect();
        let mut table = vec![u32::MAX; SIZE];
        let mut filled = 0;
        while filled < SIZE {
            for walk in &mut walks {
                if filled == SIZE {
                    break;
                }
                // Ends: a walk comes past every place, and one is free.
                while let Some(place) = table.get_mut(walk.next()) {
                    if *place == u32::MAX {
                        *place = u32::try_from(walk.index).unwrap_or(0);
                        filled += 1;
                        break;
                    }
                }
            }
        }
        Self(table)
    }

    /// The endpoint for a key; none where there are no endpoints.
    #[must_use]
    pub fn find(&self, key: u64) -> Option<usize> {
        let size = u64::try_from(self.0.len()).ok().filter(|size| *size > 0)?;
        let place = usize::try_from(key % size).ok()?;
        self.0.get(place).and_then(|index| usize::try_from(*index).ok())
    }
}

/// An endpoint's own order of all places. The paper walks by an offset and a step; two endpoints whose steps are alike
/// then meet at place after place, and whoever is removed moves many keys (2.7 times as many as had to in the worst of
/// 3,000 sets of endpoints). Scrambled counters do not have that.
struct Walk {
    index: usize,
    count: u64,
    key: u64,
}

impl Walk {
    fn new(index: usize, name: &str) -> Self {
        Self { index, count: 0, key: hash(name) }
    }

    /// Each step is one-to-one on numbers of `BITS` bits, and so is all of it.
    fn next(&mut self) -> usize {
        const MASK: u64 = (1 << BITS) - 1;
        let odd = |shift: u32| (self.key >> shift) | 1;
        let mut place = self.count.wrapping_mul(odd(0)).wrapping_add(self.key >> 16) & MASK;
        place ^= place >> 7;
        place = place.wrapping_mul(odd(32)) & MASK;
        place ^= place >> 9;
        place = place.wrapping_mul(odd(47)) & MASK;
        place ^= place >> 8;
        self.count = self.count.wrapping_add(1);
        usize::try_from(place).unwrap_or(0)
    }
}

/// The same on every machine and in every process of one version.
#[must_use]
pub fn hash<T: std::hash::Hash + ?Sized>(value: &T) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(count: usize, seed: u64) -> Vec<String> {
        (0..count).map(|n| format!("10.{seed}.{n}:80")).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn removing_one_of_many_moves_few_keys(count in 2_usize..150, gone: prop::sample::Index, seed: u64) {
            let before = names(count, seed);
            let mut after = before.clone();
            let gone = gone.index(count);
            after.remove(gone);
            let (old, new) = (Table::new(&before), Table::new(&after));
            let keys = 50_000;
            let moved = (0..keys).filter(|key| {
                let key = hash(key);
                before.get(old.find(key).unwrap()) != after.get(new.find(key).unwrap())
            });
            let (moved, bound) = (moved.count(), 2 * keys / count);
            prop_assert!(moved < bound, "{moved} of {keys} moved, of {count} endpoints");
        }

        #[test]
        fn shares_are_even(count in 1_usize..100, seed: u64) {
            let table = Table::new(&names(count, seed));
            let mut shares = vec![0_u32; count];
            for index in &table.0 {
                shares[*index as usize] += 1;
            }
            let (least, most) = (*shares.iter().min().unwrap(), *shares.iter().max().unwrap());
            prop_assert!(most - least <= 1 + least / 50, "{least} to {most}");
        }
    }

    #[test]
    fn a_walk_comes_past_every_place_once() {
        for name in ["10.0.0.1:80", "", "b"] {
            let mut walk = Walk::new(0, name);
            let places: std::collections::HashSet<usize> = (0..SIZE).map(|_| walk.next()).collect();
            assert_eq!(places.len(), SIZE);
        }
    }

    #[test]
    fn order_does_not_matter_and_nobody_gets_nothing() {
        let mut names = names(7, 1);
        let table = Table::new(&names);
        let found: Vec<String> =
            (0..100).map(|key| names[table.find(key).unwrap()].clone()).collect();
        names.reverse();
        let table = Table::new(&names);
        let again: Vec<String> =
            (0..100).map(|key| names[table.find(key).unwrap()].clone()).collect();
        assert_eq!(found, again);
        assert_eq!(Table::new(&[]).find(1), None);
    }
}
