//! A set of sequence numbers kept as disjoint ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint, non-empty, non-adjacent ranges in ascending order.
#[derive(Debug, Default, Clone)]
pub(super) struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds every number of `range`.
    pub(super) fn insert(&mut self, mut range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        // Swallow every range that overlaps or touches.
        while let Some((&start, &end)) = self.0.range(..=range.end).next_back() {
            if end < range.start {
                break;
            }
            self.0.remove(&start);
            range = range.start.min(start)..range.end.max(end);
        }
        self.0.insert(range.start, range.end);
    }

    /// Removes every number below `bound`.
    pub(super) fn remove_below(&mut self, bound: u64) {
        while let Some((&start, &end)) = self.0.first_key_value() {
            if start >= bound {
                break;
            }
            self.0.remove(&start);
            if end > bound {
                self.0.insert(bound, end);
            }
        }
    }

    /// The first range.
    pub(super) fn first(&self) -> Option<Range<u64>> {
        self.0.first_key_value().map(|(&start, &end)| start..end)
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, &end)| number < end)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many ranges there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..12), 0..60)) {
            let (mut set, mut model) = (RangeSet::default(), BTreeSet::new());
            for (insert, start, length) in steps {
                if insert {
                    set.insert(start..start + length);
                    model.extend(start..start + length);
                } else {
                    set.remove_below(start);
                    model.retain(|n| *n >= start);
                }
                for n in 0..80 {
                    prop_assert_eq!(set.contains(n), model.contains(&n));
                }
                prop_assert_eq!(set.is_empty(), model.is_empty());
                let ranges: Vec<_> = set.0.iter().collect();
                prop_assert!(ranges.windows(2).all(|w| w[0].1 < w[1].0), "disjoint, not adjacent");
            }
        }
    }
}
