//! Which endpoint gets a request. Pure: `pick(costs, allowed, randomness)`.

pub mod maglev;
pub mod peak_ewma;

use rand::Rng;

/// Power of two choices: two different endpoints at random, the cheaper one wins. Close to always taking the
/// best, without herding onto it and without looking at all of them (Mitzenmacher 2001).
///
/// `cost` of an index, `allowed` by index. Looks at all endpoints only when a random pick is not allowed.
pub fn pick<R: Rng>(
    count: usize,
    rng: &mut R,
    cost: impl Fn(usize) -> f64,
    allowed: impl Fn(usize) -> bool,
) -> Option<usize> {
    match count {
        0 => None,
        1 => allowed(0).then_some(0),
        _ => {
            let first = rng.random_range(0..count);
            let second = (first + rng.random_range(1..count)) % count;
            match (allowed(first), allowed(second)) {
                (true, true) => Some(if cost(second) < cost(first) { second } else { first }),
                (true, false) => Some(first),
                (false, true) => Some(second),
                (false, false) => {
                    let cheaper = |a: &usize, b: &usize| cost(*a).total_cmp(&cost(*b));
                    (0..count).filter(|index| allowed(*index)).min_by(cheaper)
                }
            }
        }
    }
}

/// The first that is allowed, from `start` on and around.
pub fn next(count: usize, start: usize, allowed: impl Fn(usize) -> bool) -> Option<usize> {
    (0..count).map(|n| (start % count + n) % count).find(|index| allowed(*index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    #[test]
    fn the_dearest_of_many_gets_nothing_and_the_rest_share() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut hits = [0; 5];
        for _ in 0..10_000 {
            let cost = |index| if index == 3 { 100.0 } else { 1.0 };
            hits[pick(5, &mut rng, cost, |_| true).unwrap()] += 1;
        }
        assert_eq!(hits[3], 0);
        assert!(hits.iter().enumerate().all(|(n, hits)| n == 3 || *hits > 2_000), "{hits:?}");
    }

    #[test]
    fn round_robin_goes_around() {
        let turns: Vec<_> =
            (usize::MAX - 1..=usize::MAX).map(|at| next(3, at, |n| n != 1)).collect();
        assert_eq!(turns, [Some(2), Some(0)]);
        assert_eq!(next(0, 5, |_| true), None);
        assert_eq!(next(2, 5, |_| false), None);
    }

    #[test]
    fn what_is_not_allowed_is_not_picked() {
        let mut rng = SmallRng::seed_from_u64(1);
        for _ in 0..100 {
            assert_eq!(pick(9, &mut rng, |_| 1.0, |index| index == 7), Some(7));
        }
        assert_eq!(pick(9, &mut rng, |_| 1.0, |_| false), None);
        assert_eq!(pick(0, &mut rng, |_| 1.0, |_| true), None);
    }
}
