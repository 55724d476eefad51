//! Finds the member that has waited longest among many that mostly do not wait. Working members write nothing, and finding one
//! costs O(log n).
//!
//! A member's position is checked only when it comes up: one that was active meanwhile moves to its new position, and one
//! that works leaves the line until it waits again.

use std::collections::{BTreeSet, HashMap};

/// Smaller keys `K` have waited longer. A member's key only grows while it is in line.
#[derive(Debug)]
pub(crate) struct WaitingLine<T, K> {
    next: u64,
    members: HashMap<u64, (T, Option<K>)>,
    order: BTreeSet<(K, u64)>,
}

impl<T, K> Default for WaitingLine<T, K> {
    fn default() -> WaitingLine<T, K> {
        WaitingLine { next: 0, members: HashMap::new(), order: BTreeSet::new() }
    }
}

impl<T, K: Ord + Copy> WaitingLine<T, K> {
    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// The number of the next member.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    pub(crate) fn add(&mut self, member: T, key: K) -> u64 {
        let number = self.next;
        self.next += 1;
        self.members.insert(number, (member, Some(key)));
        self.order.insert((key, number));
        number
    }

    pub(crate) fn remove(&mut self, number: u64) {
        if let Some((_, Some(key))) = self.members.remove(&number) {
            self.order.remove(&(key, number));
        }
    }

    pub(crate) fn contains(&self, number: u64) -> bool {
        self.members.contains_key(&number)
    }

    /// Moves a member to the position of this key.
    pub(crate) fn line_up(&mut self, number: u64, key: K) {
        if let Some((_, place)) = self.members.get_mut(&number) {
            if let Some(old) = place.replace(key) {
                self.order.remove(&(old, number));
            }
            self.order.insert((key, number));
        }
    }

    /// Takes the member that has waited longest out of the line; it stays a member. `key` returns a member's present key, or
    /// `None` if it does not wait; such a member leaves the line, too.
    pub(crate) fn take_longest(&mut self, key: impl Fn(&T) -> Option<K>) -> Option<&T> {
        while let Some((recorded, number)) = self.order.pop_first() {
            let Some((member, place)) = self.members.get_mut(&number) else { continue };
            *place = None;
            match key(member) {
                None => {}
                Some(now) if now > recorded => {
                    *place = Some(now);
                    self.order.insert((now, number));
                }
                Some(_) => return self.members.get(&number).map(|(member, _)| member),
            }
        }
        None
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &T> {
        self.members.values().map(|(member, _)| member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;

    #[test]
    fn those_that_work_leave_the_line_and_come_back() {
        let mut line = WaitingLine::default();
        let (busy, waits) = (line.add("busy", 1), line.add("waits", 2));
        let key = |member: &&str| if *member == "busy" { None } else { Some(2) };
        assert_eq!(line.take_longest(key), Some(&"waits"));
        assert_eq!(line.take_longest(key), None);
        assert_eq!(line.len(), 2, "both are still there");
        line.line_up(busy, 5);
        line.line_up(waits, 4);
        line.remove(waits);
        assert_eq!(line.take_longest(|_| Some(5)), Some(&"busy"));
    }

    proptest! {
        /// Whatever was active in whatever order, the member that has waited longest is found.
        #[test]
        fn the_longest_waiting_member_of_a_line_is_found(active in proptest::collection::vec((0usize..8, any::<bool>()), 0..60)) {
            let last: Vec<Cell<u64>> = (0..8).map(Cell::new).collect();
            let mut line: WaitingLine<usize, u64> = WaitingLine::default();
            let numbers: Vec<_> = (0..8).map(|member| line.add(member, last[member].get())).collect();
            for (now, (member, asks)) in active.into_iter().enumerate() {
                last[member].set(100 + now as u64);
                if asks {
                    let expected = (0..8).min_by_key(|member| last[*member].get());
                    let found = line.take_longest(|member| Some(last[*member].get())).copied();
                    prop_assert_eq!(found, expected);
                    let found = found.unwrap();
                    line.line_up(numbers[found], last[found].get());
                }
            }
        }
    }
}
