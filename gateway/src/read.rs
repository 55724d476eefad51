//! From a body on its way to a signed body, within the share of what is not verified yet.

use crate::activity::InHand;
use crate::budget::{HeldBody, MemoryBudget, Share};
use crate::waiting::{Waiting, WaitingPlace};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::inflate::{Gzip, INFLATION, Whole, WireBody};
use streamgate_core::{reason::Reason, signature::Verifier};
use streamgate_service::metrics::Metrics;
use tokio::sync::Semaphore;

/// What a request costs beside its body: what is kept of its head, and the tasks that wait for it.
const REQUEST: usize = 4 << 10;
/// How long memory is waited for that others were asked to give back: they only have to be polled.
const GIVING_BACK: Duration = Duration::from_millis(200);

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
            budget: MemoryBudget::new(memory_budget, max_body, metrics),
            waiting: Waiting::new(places),
            inflating: Semaphore::new(cores.div_ceil(2)),
        }
    }

    /// The share of a new request, with what it costs without its body.
    pub(crate) async fn begin(&self) -> Result<Share, Reason> {
        let mut share = self.budget.share();
        self.reserve(&mut share, REQUEST, None).await?;
        Ok(share)
    }

    /// Reads a body whole and checks its signature. `in_hand` knows from then on that it has matched, whatever comes after.
    /// `client`: its address, where clients can be told apart.
    pub(crate) async fn read(
        &self,
        body: &mut Incoming,
        verifier: Verifier,
        share: Share,
        in_hand: &InHand,
        client: Option<IpAddr>,
    ) -> Result<HeldBody, Reason> {
        let mut share = share;
        let place = self.waiting.enter(in_hand.connection(), client);
        let reading = self.receive(body, verifier, &mut share, in_hand, place);
        let whole = tokio::time::timeout(self.body_timeout, reading).await.unwrap_or(Err(Reason::BodyTimeout))?;
        match whole {
            Whole::Signed(bytes) => {
                in_hand.signed();
                share.signed();
                Ok(HeldBody { bytes, _share: share })
            }
            Whole::Gzip(gzip) => self.inflate(&gzip, share, in_hand).await,
        }
    }

    async fn receive(
        &self,
        body: &mut Incoming,
        verifier: Verifier,
        share: &mut Share,
        in_hand: &InHand,
        place: WaitingPlace<'_>,
    ) -> Result<Whole, Reason> {
        let connection = in_hand.connection();
        let mut wire = WireBody::new(verifier, self.max_body);
        loop {
            let frame = tokio::select! {
                biased;
                frame = body.frame() => frame,
                () = place.displaced() => return Err(Reason::Displaced),
                () = connection.evicted.cancelled() => return Err(Reason::Displaced),
            };
            let Some(frame) = frame else { return wire.finish() };
            let frame: Frame<Bytes> = frame.map_err(|_| Reason::BodyIncomplete)?;
            // Trailers are none of ours.
            let Some(data) = frame.data_ref() else { continue };
            place.byte();
            connection.body_arrived();
            self.reserve(share, wire.growth(data.len())?, Some(&place)).await?;
            wire.push(data)?;
        }
    }

    /// Reserves memory for what is not verified, if need be that of requests that have waited longer for a byte.
    async fn reserve(&self, share: &mut Share, bytes: usize, place: Option<&WaitingPlace<'_>>) -> Result<(), Reason> {
        loop {
            let freed = self.budget.freed();
            if bytes == 0 || share.reserve(bytes) {
                return Ok(());
            }
            if !self.waiting.displace_other(place) || tokio::time::timeout(GIVING_BACK, freed).await.is_err() {
                return Err(Reason::MemoryBudget);
            }
        }
    }

    async fn inflate(&self, gzip: &Gzip, mut share: Share, in_hand: &InHand) -> Result<HeldBody, Reason> {
        self.reserve(&mut share, INFLATION, None).await?;
        let mut check = gzip.check(self.max_body)?;
        let mut stepped = check.step()?;
        let length = loop {
            match stepped {
                Some(length) => break length,
                None => {
                    // For each step anew: who inflates little does not wait for who inflates much.
                    tokio::task::yield_now().await;
                    let _permit = self.inflating.acquire().await;
                    stepped = check.step()?;
                }
            }
        };
        in_hand.signed();
        share.signed();
        drop(check);
        if !share.reserve(length) {
            return Err(Reason::MemoryBudget);
        }
        let mut inflate = gzip.inflate(length)?;
        loop {
            if let Some(bytes) = inflate.step()? {
                return Ok(HeldBody { bytes, _share: share.split(length) });
            }
            tokio::task::yield_now().await;
        }
    }
}
