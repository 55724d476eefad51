//! From a body on its way to a signed body, within the share of what is not verified yet.

use crate::activity::InHand;
use crate::budget::{HeldBody, MemoryBudget, Share, Short};
use crate::waiting::{Displaced, Waiting, WaitingPlace};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::inflate::{Checked, Compressed, Declared, INFLATION, Whole, WireBody};
use streamgate_core::{reason::Reason, signature::Verifier};
use streamgate_service::metrics::Metrics;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

/// What a request costs beside its body: what is kept of its head, and the tasks that wait for it.
const REQUEST: usize = 4 << 10;
/// How long memory is waited for that others were asked to give back: they only have to be polled.
const GIVING_BACK: Duration = Duration::from_millis(200);

/// Steps of br that run at a time before a signature is known. Each may allocate a window and tables, 8 MiB at the most; what is left of
/// them after it is paid for.
const HEAVY_STEPS: usize = 2;

/// What all reading requests of a gateway share.
#[derive(Debug)]
pub(crate) struct Reader {
    max_body: usize,
    body_timeout: Duration,
    budget: Arc<MemoryBudget>,
    waiting: Waiting,
    /// Steps of large inflations that run at a time, before a signature is known: half of the cores, so that a stranger's
    /// bombs leave the other half.
    inflating: Semaphore,
    /// Steps that may hold megabytes before they are paid for.
    heavy: Semaphore,
}

impl Reader {
    /// `places`: requests that may wait for their bodies at a time.
    pub(crate) fn new(
        max_body: usize,
        body_timeout: Duration,
        memory_budget: usize,
        places: usize,
        metrics: Arc<Metrics>,
    ) -> Reader {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Reader {
            max_body,
            body_timeout,
            budget: MemoryBudget::new(memory_budget, max_body.saturating_add(REQUEST), metrics),
            waiting: Waiting::new(places),
            inflating: Semaphore::new(cores.div_ceil(2)),
            heavy: Semaphore::new(HEAVY_STEPS.min(cores.div_ceil(2))),
        }
    }

    /// A new request, with its place and what it costs without its body. `client`: its address, where clients can be told apart.
    pub(crate) async fn begin<'r>(
        &'r self,
        in_hand: &'r InHand,
        client: Option<IpAddr>,
    ) -> Result<Reading<'r>, Reason> {
        let connection = in_hand.connection();
        let place = self.waiting.enter(connection, client);
        let share = self.budget.share(Arc::clone(&connection.unverified_bytes));
        let mut reading = Reading { reader: self, in_hand, place, share };
        reading.reserve(REQUEST).await?;
        Ok(reading)
    }
}

/// A request that is not verified yet. Until it is, it can be displaced whatever it waits for.
#[derive(Debug)]
pub(crate) struct Reading<'r> {
    reader: &'r Reader,
    in_hand: &'r InHand,
    // Before the share: a request that sees the place gone finds the memory there, or is notified when it is.
    place: WaitingPlace<'r>,
    share: Share,
}

impl Reading<'_> {
    /// What it costs beside its body, which is held until its answer is taken.
    pub(crate) fn cost(&mut self) -> Share {
        self.share.split(REQUEST)
    }

    /// Reads the body whole and checks its signature. `in_hand` knows from then on that it has matched, whatever comes after.
    pub(crate) async fn read(
        mut self,
        body: &mut Incoming,
        verifier: Verifier,
        declared: Declared,
    ) -> Result<HeldBody, Reason> {
        let timeout = self.reader.body_timeout;
        let whole = tokio::time::timeout(timeout, self.receive(body, verifier, declared)).await;
        match whole.unwrap_or(Err(Reason::BodyTimeout))? {
            Whole::Signed(bytes) => {
                self.in_hand.signed();
                self.share.signed();
                Ok(HeldBody { bytes, _share: self.share })
            }
            Whole::Compressed(compressed) => self.inflate(&compressed).await,
        }
    }

    async fn receive(&mut self, body: &mut Incoming, verifier: Verifier, declared: Declared) -> Result<Whole, Reason> {
        let mut wire = WireBody::new(verifier, declared, self.reader.max_body);
        loop {
            let Some(frame) = self.unless_displaced(body.frame()).await? else { return wire.finish() };
            let frame: Frame<Bytes> = frame.map_err(|_| Reason::BodyIncomplete)?;
            // Trailers are none of ours.
            let Some(data) = frame.data_ref() else { continue };
            self.place.byte();
            self.in_hand.connection().body_arrived();
            self.reserve(wire.growth(data.len())?).await?;
            wire.push(data)?;
        }
    }

    async fn unless_displaced<T>(&self, waited_for: impl Future<Output = T>) -> Result<T, Reason> {
        tokio::select! {
            biased;
            result = waited_for => Ok(result),
            () = self.place.displaced() => Err(Reason::Displaced),
            () = self.in_hand.connection().evicted.cancelled() => Err(Reason::Displaced),
        }
    }

    /// Reserves memory for what is not verified, if need be that of one request after the other that has waited longer for a byte.
    async fn reserve(&mut self, bytes: usize) -> Result<(), Reason> {
        if bytes == 0 || self.try_reserve(bytes).is_ok() {
            return Ok(());
        }
        let until = Instant::now() + GIVING_BACK;
        let mut displaced: Option<Displaced> = None;
        loop {
            let freed = self.reader.budget.freed();
            let Err(short) = self.try_reserve(bytes) else { return Ok(()) };
            if displaced.as_ref().is_none_or(Displaced::is_gone) {
                displaced = self.reader.waiting.displace_other(&self.place, short);
                match &displaced {
                    Some(victim) if victim.is_heavy() => {}
                    // Answers that peers leave untaken, then.
                    Some(_) => self.in_hand.connection().evict_for_memory(),
                    None => return Err(Reason::MemoryBudget),
                }
            }
            self.unless_displaced(timeout_at(until, freed)).await?.map_err(|_| Reason::MemoryBudget)?;
        }
    }

    fn try_reserve(&mut self, bytes: usize) -> Result<(), Short> {
        self.share.reserve(bytes)?;
        self.place.holds(self.share.held());
        Ok(())
    }

    /// Both passes. What turns out not to be signed after all that work costs its connection.
    async fn inflate(mut self, body: &Compressed) -> Result<HeldBody, Reason> {
        self.reserve(INFLATION).await?;
        let checked = self.check(body).await.inspect_err(|reason| {
            // Want of memory is nobody's fault.
            if !matches!(reason, Reason::Displaced | Reason::MemoryBudget) {
                self.in_hand.strike();
            }
        })?;
        self.in_hand.signed();
        self.share.signed();
        // A signed one has its place among the signed, and needs none here.
        let Reading { mut share, place, .. } = self;
        drop(place);
        let length = match &checked {
            Checked::Short(bytes) => bytes.len(),
            Checked::Long { length, .. } => *length,
        };
        share.reserve(length).map_err(|_| Reason::MemoryBudget)?;
        let format = match checked {
            Checked::Short(bytes) => return Ok(HeldBody { bytes, _share: share.split(length) }),
            Checked::Long { format, .. } => format,
        };
        let mut inflate = body.inflate(format, length)?;
        loop {
            if let Some(bytes) = inflate.step()? {
                return Ok(HeldBody { bytes, _share: share.split(length) });
            }
            tokio::task::yield_now().await;
        }
    }

    /// The first pass. The first step runs at once; those after it some at a time, each anew, so that who inflates
    /// little does not wait for who inflates much.
    async fn check(&mut self, body: &Compressed) -> Result<Checked, Reason> {
        let mut check = body.check(self.reader.max_body)?;
        let reader = self.reader;
        let (mut is_first, mut paid) = (true, 0);
        loop {
            let heavy = match body.is_heavy() {
                true => Some(self.unless_displaced(reader.heavy.acquire()).await?),
                false => None,
            };
            let permit = match is_first {
                true => None,
                false => Some(self.unless_displaced(reader.inflating.acquire()).await?),
            };
            let checked = check.step()?;
            if let Some(checked @ Checked::Short(_)) = checked {
                return Ok(checked);
            }
            // What the decoder has allocated meanwhile: until it is paid for, nobody else allocates. The second pass takes as much.
            let held = check.held();
            self.reserve(held.saturating_sub(paid)).await?;
            if let Some(checked) = checked {
                return Ok(checked);
            }
            (is_first, paid) = (false, held.max(paid));
            drop((permit, heavy));
            tokio::task::yield_now().await;
        }
    }
}
