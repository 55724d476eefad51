//! Reads a request's body and verifies it, within the memory share of unverified bodies.

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

/// What a request costs besides its body: what is kept of its head, and the tasks that wait for it.
const REQUEST: usize = 4 << 10;
/// How long to wait for memory that other requests were asked to give back: they only have to be polled.
const GIVING_BACK: Duration = Duration::from_millis(200);

/// Steps of br that run at a time before a signature is known. Each may allocate a window and tables, 8 MiB at most; what remains
/// allocated after the step is paid for.
const HEAVY_STEPS: usize = 2;

/// State shared by all requests of a gateway whose bodies are being read.
#[derive(Debug)]
pub(crate) struct Reader {
    max_body: usize,
    body_timeout: Duration,
    budget: Arc<MemoryBudget>,
    waiting: Waiting,
    /// Limits steps of large inflations before a signature is known to half of the cores, so that a stranger's bombs leave the
    /// other half.
    inflating: Semaphore,
    /// Limits steps that may hold megabytes before they are paid for.
    heavy: Semaphore,
}

impl Reader {
    /// `places` is how many requests may wait for their bodies at a time.
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

    /// Gives a new request its place, and reserves its cost without the body. `client` is its address, if clients can be
    /// distinguished.
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

/// A request that is not verified yet. Until then it can be displaced, whatever it waits for.
#[derive(Debug)]
pub(crate) struct Reading<'r> {
    reader: &'r Reader,
    in_hand: &'r InHand,
    // Dropped before the share: a request that sees the place gone either finds its memory free or is notified when it is.
    place: WaitingPlace<'r>,
    share: Share,
}

impl Reading<'_> {
    /// Splits off the request's cost besides its body, which is held until the answer is taken.
    pub(crate) fn cost(&mut self) -> Share {
        self.share.split(REQUEST)
    }

    /// Reads the whole body and checks its signature. From the match on, `in_hand` counts as signed, whatever happens later.
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
            // Trailers are ignored.
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

    /// Reserves memory for unverified bytes; if necessary, displaces one request after another, those that waited longest for
    /// a byte first.
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
                    // Waiting bodies hold little; the memory is held by answers that peers do not take.
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

    /// Runs both passes of an inflation. A body that turns out not to be signed after all that work costs its connection.
    async fn inflate(mut self, body: &Compressed) -> Result<HeldBody, Reason> {
        self.reserve(INFLATION).await?;
        let checked = self.check(body).await.inspect_err(|reason| {
            // A lack of memory is not the sender's fault.
            if !matches!(reason, Reason::Displaced | Reason::MemoryBudget) {
                self.in_hand.strike();
            }
        })?;
        self.in_hand.signed();
        self.share.signed();
        // A signed request has its place among the signed ones, and needs none here.
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

    /// The first pass. Its first step runs at once; later ones take a permit each, so that small inflations do not wait for large
    /// ones.
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
            // Pays for what the decoder has allocated before another step may allocate. The second pass takes as much.
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
