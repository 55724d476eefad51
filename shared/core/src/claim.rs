//! The worker's claim: who may run a handler for an event and route, as a pure state machine.
//!
//! Queues deliver at least once, and retry copies may exist next to their originals. The claim lets one of them run at a
//! time, and none after the event is finished. It saves repeats, but no promise rests on it: a store that forgets
//! costs repeats, not losses, because only a settled delivery leaves the queue.
//!
//! It also counts the attempts that were begun and never concluded. Only these distinguish poison from bad luck: a queue's
//! own count of deliveries includes those that no handler ever saw.

/// An event, for one route, in one of its lives.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClaimKey {
    /// The event's idempotency key.
    pub event: String,
    /// Route and replay nonce.
    pub life: String,
}

impl std::fmt::Display for ClaimKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}|{}", self.event, self.life)
    }
}

/// The state recorded under a claim key. `abandoned` counts the attempts of this number that were begun and never concluded:
/// their leases lapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A handler runs for the copy with this attempt. `holder` identifies the holder; `until_ms` is a time of the store's clock.
    Leased {
        attempt: u32,
        abandoned: u32,
        holder: u64,
        until_ms: i64,
    },
    /// A copy with this attempt is durable.
    Retrying {
        attempt: u32,
        abandoned: u32,
    },
    Done,
    Dead,
}

/// What to do with a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The lease is granted: run the handler.
    Run { abandoned: u32 },
    /// Another holder's lease is live: come back later, without counting an attempt.
    Wait,
    /// The event goes on in a newer copy, or is finished: settle this one without running a handler.
    Superseded,
}

/// How a held claim ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conclusion {
    Done,
    /// The copy with this attempt is durable.
    Retrying {
        attempt: u32,
    },
    Dead,
    /// Nothing was decided, and the event is not to blame: the delivery goes back as it came.
    Released,
}

/// Claims the lease for a delivery. Returns the verdict and, if it changes, the state to record.
pub fn claim(
    recorded: Option<State>,
    attempt: u32,
    holder: u64,
    now_ms: i64,
    lease_ms: i64,
) -> (Verdict, Option<State>) {
    let run = |abandoned| {
        let leased = State::Leased { attempt, abandoned, holder, until_ms: now_ms.saturating_add(lease_ms) };
        (Verdict::Run { abandoned }, Some(leased))
    };
    match recorded {
        None => run(0),
        Some(State::Leased { until_ms, .. }) if until_ms > now_ms => (Verdict::Wait, None),
        // A copy older than the recorded one was settled before the recorded one was made.
        Some(State::Leased { attempt: held, .. } | State::Retrying { attempt: held, .. }) if attempt < held => {
            (Verdict::Superseded, None)
        }
        // The holder is gone and concluded nothing.
        Some(State::Leased { attempt: held, abandoned, .. }) if attempt == held => run(abandoned.saturating_add(1)),
        Some(State::Retrying { attempt: held, abandoned }) if attempt == held => run(abandoned),
        // A later attempt proves that the recorded one was concluded.
        Some(State::Leased { .. } | State::Retrying { .. }) => run(0),
        Some(State::Done | State::Dead) => (Verdict::Superseded, None),
    }
}

/// Extends the holder's lease. Returns the state to record, or `None` if the lease is no longer the holder's.
pub fn renew(recorded: Option<State>, holder: u64, now_ms: i64, lease_ms: i64) -> Option<State> {
    match recorded {
        Some(State::Leased { attempt, abandoned, holder: held, .. }) if held == holder => {
            Some(State::Leased { attempt, abandoned, holder, until_ms: now_ms.saturating_add(lease_ms) })
        }
        _ => None,
    }
}

/// Concludes the holder's claim. Returns the state from then on. It never goes backwards: success outranks everything, and a
/// copy that lost its lease cannot undo what its successor recorded.
pub fn conclude(recorded: Option<State>, holder: u64, conclusion: Conclusion) -> Option<State> {
    match (conclusion, recorded) {
        (Conclusion::Done, _) | (_, Some(State::Done)) => Some(State::Done),
        (Conclusion::Dead, _) | (_, Some(State::Dead)) => Some(State::Dead),
        // Another holder's lease is recorded: whatever comes next waits for that holder.
        (Conclusion::Retrying { .. } | Conclusion::Released, Some(State::Leased { holder: other, .. }))
            if other != holder =>
        {
            recorded
        }
        (Conclusion::Retrying { attempt }, Some(State::Retrying { attempt: held, .. })) if held >= attempt => recorded,
        (Conclusion::Retrying { attempt }, _) => Some(State::Retrying { attempt, abandoned: 0 }),
        (Conclusion::Released, Some(State::Retrying { .. })) => recorded,
        // Attempts that earlier holders abandoned still count.
        (Conclusion::Released, Some(State::Leased { attempt, abandoned, .. })) => {
            (abandoned > 0).then_some(State::Retrying { attempt, abandoned })
        }
        (Conclusion::Released, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_table_of_claims() {
        let live = Some(State::Leased { attempt: 2, abandoned: 3, holder: 9, until_ms: 101 });
        let lapsed = Some(State::Leased { attempt: 2, abandoned: 3, holder: 9, until_ms: 100 });
        let retrying = Some(State::Retrying { attempt: 2, abandoned: 3 });
        let run = |abandoned| Verdict::Run { abandoned };
        let cases = [
            (None, 1, run(0)),
            (live, 1, Verdict::Wait),
            (live, 2, Verdict::Wait),
            (live, 3, Verdict::Wait),
            (lapsed, 1, Verdict::Superseded),
            (lapsed, 2, run(4)),
            (lapsed, 3, run(0)),
            (retrying, 1, Verdict::Superseded),
            (retrying, 2, run(3)),
            (retrying, 3, run(0)),
            (Some(State::Done), 1, Verdict::Superseded),
            (Some(State::Dead), 1, Verdict::Superseded),
        ];
        for (recorded, attempt, expected) in cases {
            let (verdict, state) = claim(recorded, attempt, 1, 100, 50);
            assert_eq!(verdict, expected, "{recorded:?}, attempt {attempt}");
            let leased = |abandoned| State::Leased { attempt, abandoned, holder: 1, until_ms: 150 };
            let expected = if let Verdict::Run { abandoned } = verdict { Some(leased(abandoned)) } else { None };
            assert_eq!(state, expected);
        }
    }

    #[test]
    fn a_table_of_conclusions() {
        let leased = |attempt, abandoned, holder| Some(State::Leased { attempt, abandoned, holder, until_ms: 0 });
        let (own, other, later, blamed) = (leased(1, 0, 1), leased(1, 0, 2), leased(2, 0, 2), leased(1, 7, 1));
        let retrying_after = |abandoned| Some(State::Retrying { attempt: 2, abandoned });
        let retrying = retrying_after(0);
        let cases = [
            (own, Conclusion::Done, Some(State::Done)),
            (own, Conclusion::Dead, Some(State::Dead)),
            (own, Conclusion::Retrying { attempt: 2 }, retrying),
            (own, Conclusion::Released, None),
            (blamed, Conclusion::Released, Some(State::Retrying { attempt: 1, abandoned: 7 })),
            (blamed, Conclusion::Retrying { attempt: 2 }, retrying),
            (retrying_after(3), Conclusion::Retrying { attempt: 2 }, retrying_after(3)),
            (other, Conclusion::Released, other),
            (other, Conclusion::Retrying { attempt: 2 }, other),
            (retrying, Conclusion::Released, retrying),
            (
                Some(State::Retrying { attempt: 3, abandoned: 0 }),
                Conclusion::Retrying { attempt: 2 },
                Some(State::Retrying { attempt: 3, abandoned: 0 }),
            ),
            (later, Conclusion::Retrying { attempt: 2 }, later),
            (retrying, Conclusion::Done, Some(State::Done)),
            (Some(State::Done), Conclusion::Dead, Some(State::Done)),
            (Some(State::Done), Conclusion::Retrying { attempt: 2 }, Some(State::Done)),
            (Some(State::Dead), Conclusion::Retrying { attempt: 2 }, Some(State::Dead)),
            (Some(State::Dead), Conclusion::Done, Some(State::Done)),
            (Some(State::Dead), Conclusion::Released, Some(State::Dead)),
            (None, Conclusion::Retrying { attempt: 2 }, retrying),
        ];
        for (recorded, conclusion, expected) in cases {
            assert_eq!(conclude(recorded, 1, conclusion), expected, "{recorded:?} {conclusion:?}");
        }
    }

    #[test]
    fn only_the_holder_renews() {
        let held = Some(State::Leased { attempt: 1, abandoned: 2, holder: 1, until_ms: 10 });
        assert_eq!(renew(held, 1, 5, 10), Some(State::Leased { attempt: 1, abandoned: 2, holder: 1, until_ms: 15 }));
        assert_eq!(renew(held, 2, 5, 10), None);
        assert_eq!(renew(Some(State::Done), 1, 5, 10), None);
        assert_eq!(renew(None, 1, 5, 10), None);
    }

    /// A model of one event: copies in a queue, workers that take them, and faults between any two steps.
    #[derive(Debug, Default)]
    struct World {
        recorded: Option<State>,
        now_ms: i64,
        next_holder: u64,
        /// Attempts of the copies in the queue.
        queue: Vec<u32>,
        running: Vec<Run>,
        handled: bool,
        dead: bool,
        /// Processes that died, or whose lease lapsed, while a handler ran.
        abandoned: u32,
        /// The highest count that the event was ever blamed for.
        blamed: u32,
    }

    #[derive(Clone, Copy, Debug)]
    struct Run {
        attempt: u32,
        holder: u64,
        until_ms: i64,
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Deliver(usize),
        Succeed(usize),
        /// Fails and makes a retry copy. The flag means that the claim store lost the new state.
        Retry(usize, bool),
        Bury(usize),
        /// The process dies, and its copy returns to the queue.
        Crash(usize),
        /// The publish of a copy was repeated.
        Duplicate(usize),
        Renew(usize),
        Pass(i64),
        /// The claim store lost everything.
        Forget,
    }

    const LEASE_MS: i64 = 50;
    const LAST_ATTEMPT: u32 = 6;

    impl World {
        /// Returns false if two handlers ran at once without a lapse or a loss of the store.
        fn step(&mut self, step: Step) -> bool {
            let pick = |n: usize, len: usize| (len > 0).then(|| n % len);
            match step {
                Step::Deliver(n) => {
                    let Some(at) = pick(n, self.queue.len()) else { return true };
                    let attempt = self.queue.remove(at);
                    self.next_holder += 1;
                    let (verdict, state) = claim(self.recorded, attempt, self.next_holder, self.now_ms, LEASE_MS);
                    self.recorded = state.or(self.recorded);
                    match verdict {
                        Verdict::Run { abandoned } => {
                            self.blamed = self.blamed.max(abandoned);
                            let overrun = self.running.iter().any(|run| run.until_ms <= self.now_ms);
                            self.abandoned += u32::from(overrun);
                            let free = self.running.iter().all(|run| run.until_ms <= self.now_ms);
                            let until_ms = self.now_ms + LEASE_MS;
                            self.running.push(Run { attempt, holder: self.next_holder, until_ms });
                            return free;
                        }
                        Verdict::Wait => self.queue.push(attempt),
                        Verdict::Superseded => {}
                    }
                }
                Step::Succeed(n) => self.end(n, Conclusion::Done, |world, _| world.handled = true),
                Step::Retry(n, lost) => {
                    let Some(at) = pick(n, self.running.len()) else { return true };
                    let attempt = self.running[at].attempt + 1;
                    if attempt > LAST_ATTEMPT {
                        return true;
                    }
                    let before = self.recorded;
                    self.end(n, Conclusion::Retrying { attempt }, |world, _| world.queue.push(attempt));
                    if lost {
                        self.abandoned += 1;
                        self.recorded = before;
                    }
                }
                Step::Bury(n) => self.end(n, Conclusion::Dead, |world, _| world.dead = true),
                Step::Crash(n) => {
                    if let Some(at) = pick(n, self.running.len()) {
                        let run = self.running.remove(at);
                        self.abandoned += 1;
                        self.queue.push(run.attempt);
                    }
                }
                Step::Duplicate(n) => {
                    if let Some(at) = pick(n, self.queue.len()).filter(|_| self.queue.len() < 6) {
                        self.queue.push(self.queue[at]);
                    }
                }
                Step::Renew(n) => {
                    if let Some(at) = pick(n, self.running.len())
                        && let Some(state) = renew(self.recorded, self.running[at].holder, self.now_ms, LEASE_MS)
                    {
                        self.recorded = Some(state);
                        self.running[at].until_ms = self.now_ms + LEASE_MS;
                    }
                }
                Step::Pass(ms) => self.now_ms += ms,
                Step::Forget => {
                    self.recorded = None;
                    // The running holder has lost its lease without a lapse, which is the exception that the promise names.
                    self.running.iter_mut().for_each(|run| run.until_ms = self.now_ms);
                }
            }
            true
        }

        fn end(&mut self, n: usize, conclusion: Conclusion, effect: impl FnOnce(&mut World, Run)) {
            if self.running.is_empty() {
                return;
            }
            let run = self.running.remove(n % self.running.len());
            effect(self, run);
            self.recorded = conclude(self.recorded, run.holder, conclusion);
        }
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let n = 0usize..8;
        proptest::collection::vec(
            prop_oneof![
                4 => n.clone().prop_map(Step::Deliver),
                1 => n.clone().prop_map(Step::Succeed),
                3 => (n.clone(), any::<bool>()).prop_map(|(n, lost)| Step::Retry(n, lost)),
                1 => n.clone().prop_map(Step::Bury),
                2 => n.clone().prop_map(Step::Crash),
                1 => n.clone().prop_map(Step::Duplicate),
                1 => n.prop_map(Step::Renew),
                3 => (1i64..80).prop_map(Step::Pass),
                1 => Just(Step::Forget),
            ],
            0..60,
        )
    }

    proptest! {
        // Two handlers at once take five steps in the right order, which the default of 256 cases rarely finds.
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn no_event_runs_twice_without_a_lapsed_lease_and_none_is_lost(steps in steps()) {
            let mut world = World { queue: vec![1], ..World::default() };
            for step in steps {
                let finished = matches!(world.recorded, Some(State::Done | State::Dead));
                let running = world.running.len();
                prop_assert!(world.step(step), "two ran at once: {step:?} in {world:?}");
                prop_assert!(!finished || world.running.len() <= running, "ran after the end: {step:?} in {world:?}");
                let somewhere = world.handled || world.dead || !world.queue.is_empty() || !world.running.is_empty();
                prop_assert!(world.blamed <= world.abandoned, "blamed without an abandoned attempt: {step:?} in {world:?}");
                prop_assert!(somewhere, "the event is nowhere after {step:?}: {world:?}");
            }
        }
    }
}
