//! Talks to an ACME authority (RFC 8555): an account, then an order proved by TLS-ALPN-01 (RFC 8737).

use super::authority_folder::{Attempt, AuthorityFolder, AuthorityFolderError};
use super::challenge::Challenges;
use super::schedule::Cause;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::header::RETRY_AFTER;
use hyper::http::uri::Scheme;
use instant_acme::{
    Account, AuthorizationStatus, BodyWrapper, BytesResponse, ChallengeType, Error, Identifier, Key, NewOrder, Order,
    OrderStatus, Problem, RetryPolicy,
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use std::fmt::Write;
use std::pin::Pin;
use std::time::Duration;
use streamgate_service::config::AcmeConfig;
use streamgate_service::http_client::{self, HttpClient, causes};
use tokio::time::Instant;

/// Limit of one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How often, and how long, the authority is asked whether it has checked the names or signed the certificate.
const POLLS: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_secs(1)).backoff(1.0).timeout(Duration::from_secs(240));
/// The longest delay, in seconds, that an authority's Retry-After may ask for.
const LONGEST_PAUSE: u64 = 240;
/// How long to keep fetching a signed certificate, failures included: it counts against the authority's limits.
const FETCH: Duration = Duration::from_secs(300);
const FETCH_PAUSE: Duration = Duration::from_secs(5);
/// A chain has a few kilobytes, and some more with up to 100 names.
const MAX_ANSWER: usize = 1 << 20;
/// Most characters of an authority's message in a log line or in /readyz.
const MAX_DESCRIPTION: usize = 400;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(super) struct Failure {
    pub(super) cause: Cause,
    what: String,
}

impl Failure {
    pub(super) fn new(cause: Cause, what: impl std::fmt::Display) -> Failure {
        // It may come from the network, and goes to logs and /readyz.
        let what: String =
            what.to_string().chars().filter(|character| !character.is_control()).take(MAX_DESCRIPTION).collect();
        Failure { cause, what }
    }

    pub(super) fn setup(error: impl std::fmt::Display) -> Failure {
        Failure::new(Cause::Unreachable, error)
    }

    fn problem(problem: &Problem) -> Failure {
        let cause = match kind(problem) {
            Some("badNonce") => Cause::Nonce,
            Some("rateLimited") => Cause::RateLimited,
            Some("serverInternal") => Cause::Unreachable,
            Some(_) | None => Cause::Refused,
        };
        Failure::new(cause, description(problem))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        if let Error::Api(problem) = &error {
            return Failure::problem(problem);
        }
        let cause = if matches!(error, Error::Unsupported(_)) { Cause::Refused } else { Cause::Unreachable };
        Failure::new(cause, causes(&error))
    }
}

impl From<AuthorityFolderError> for Failure {
    fn from(error: AuthorityFolderError) -> Failure {
        Failure::setup(error)
    }
}

/// The authority's own description of a problem.
fn description(problem: &Problem) -> String {
    let mut text = problem.detail.clone().unwrap_or_else(|| "no reason given".to_owned());
    for part in &problem.subproblems {
        if let (Some(Identifier::Dns(name)), Some(detail)) = (&part.identifier, &part.detail) {
            // Writing to a string never fails.
            write!(text, "; {name}: {detail}").ok();
        }
    }
    if let Some(kind) = &problem.r#type {
        write!(text, " ({kind})").ok();
    }
    text
}

/// Checks that the URL serves an ACME directory.
pub(super) async fn answers(config: &AcmeConfig) -> Result<(), Failure> {
    let client = http_client::client(config.ca.as_deref()).map_err(Failure::setup)?;
    let request = Request::get(&config.directory).body(Full::default()).map_err(Failure::setup)?;
    let mut answer = ask(client, request).await?;
    let body = answer.body.into_bytes().await.map_err(Failure::setup)?;
    let directory: serde_json::Value = serde_json::from_slice(&body).map_err(Failure::setup)?;
    match directory.get("newOrder") {
        Some(_) => Ok(()),
        None => Err(Failure::setup("the response is not the directory of an ACME authority")),
    }
}

/// Returns a new key and the chain of a new certificate, in PEM. `refused` is noted once the authority may count a certificate.
pub(super) async fn obtain(
    config: &AcmeConfig,
    kept: &AuthorityFolder,
    challenges: &Challenges,
    refused: &Attempt,
) -> Result<String, Failure> {
    let (account, is_new) = account(config, kept).await?;
    let contacts: Vec<_> = config.contact.iter().map(|mail| format!("mailto:{mail}")).collect();
    let contacts: Vec<_> = contacts.iter().map(String::as_str).collect();
    // The contacts do not affect the certificate.
    if let Err(error) = account.update_contacts(&contacts).await {
        let failure = Failure::from(error);
        tracing::warn!(%failure, "the certificate authority rejected gateway.tls.acme.contact");
    }
    let names: Vec<_> = config.domains.iter().cloned().map(Identifier::Dns).collect();
    let mut order = match account.new_order(&NewOrder::new(&names)).await {
        Err(error) if is_closed(&error) && !is_new => {
            another_account(config, kept, &error).await?.new_order(&NewOrder::new(&names)).await?
        }
        ordered => ordered?,
    };
    prove(&mut order, challenges).await?;
    let key = KeyPair::generate().map_err(Failure::setup)?;
    let mut params = CertificateParams::new(config.domains.clone()).map_err(Failure::setup)?;
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key).map_err(Failure::setup)?;
    kept.keep_attempt(refused).await?;
    Ok(key.serialize_pem() + &signed(&mut order, request.der()).await?)
}

/// The account of the kept key, which the authority creates if it does not know the key or has forgotten it. Also returns whether
/// the key is new.
async fn account(config: &AcmeConfig, kept: &AuthorityFolder) -> Result<(Account, bool), Failure> {
    let Some(pem) = kept.account()? else { return Ok((new_account(config, kept).await?, true)) };
    match key(&pem) {
        Ok(key) => match register(config, key).await {
            Err(error) if is_closed(&error) => Ok((another_account(config, kept, &error).await?, true)),
            registered => Ok((registered?, false)),
        },
        Err(error) => {
            tracing::warn!(%error, "the account's key is damaged; making another");
            Ok((new_account(config, kept).await?, true))
        }
    }
}

/// Creates an account. Its key is kept before it is used, or each attempt could leave an account behind.
async fn new_account(config: &AcmeConfig, kept: &AuthorityFolder) -> Result<Account, Failure> {
    let pem = KeyPair::generate().map_err(Failure::setup)?.serialize_pem();
    kept.keep_account(pem.clone()).await?;
    let account = register(config, key(&pem)?).await?;
    tracing::info!(directory = config.directory, "made an account with the certificate authority");
    Ok(account)
}

async fn another_account(config: &AcmeConfig, kept: &AuthorityFolder, error: &Error) -> Result<Account, Failure> {
    tracing::warn!(%error, "the certificate authority rejected the account; making another");
    new_account(config, kept).await
}

/// Whether the account was deactivated (RFC 8555, section 7.3.6), after which its key is useless.
fn is_closed(error: &Error) -> bool {
    matches!(error, Error::Api(problem) if kind(problem) == Some("unauthorized"))
}

type AccountKey = (Key, PrivatePkcs8KeyDer<'static>);

fn key(pem: &str) -> Result<AccountKey, Failure> {
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(Failure::setup)?;
    Ok((Key::from_pkcs8_der(der.clone_key())?, der))
}

async fn register(config: &AcmeConfig, (key, der): AccountKey) -> Result<Account, Error> {
    let client = http_client::client(config.ca.as_deref()).map_err(|error| Error::Other(error.into()))?;
    let builder = Account::builder_with_http(Box::new(Web(client)));
    Ok(builder.create_from_key((key, der.into()), config.directory.clone()).await?.0)
}

/// The last segment of a problem's type (RFC 8555, section 6.7).
fn kind(problem: &Problem) -> Option<&str> {
    problem.r#type.as_deref()?.rsplit(':').next()
}

/// Proves that the names lead here.
async fn prove(order: &mut Order, challenges: &Challenges) -> Result<(), Failure> {
    // The proofs are withdrawn when this ends, in whatever way.
    let mut proofs = challenges.proofs();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        match authorization.status {
            // Proved recently, for another order.
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            AuthorizationStatus::Invalid
            | AuthorizationStatus::Revoked
            | AuthorizationStatus::Expired
            | AuthorizationStatus::Deactivated => {
                let what = format!("the authorization of {} is neither valid nor pending", authorization.identifier());
                return Err(Failure::new(Cause::Refused, what));
            }
        }
        let name = authorization.identifier().to_string();
        let offered = authorization.challenge(ChallengeType::TlsAlpn01);
        let mut challenge =
            offered.ok_or_else(|| Failure::new(Cause::Refused, "the authority does not offer TLS-ALPN-01"))?;
        proofs.give(&name, challenge.key_authorization().digest().as_ref()).map_err(Failure::setup)?;
        challenge.set_ready().await?;
    }
    let polled = order.poll_ready(&POLLS).await;
    if order.state().status == OrderStatus::Invalid {
        return Err(refusal(order).await);
    }
    polled?;
    Ok(())
}

/// Returns the chain, in PEM. Once the authority may have signed, a failure here is not followed by another order soon.
async fn signed(order: &mut Order, request: &[u8]) -> Result<String, Failure> {
    if let Err(error) = order.finalize_csr(request).await {
        let failure = Failure::from(error);
        // Without an answer the authority may have received the request all the same.
        if failure.cause != Cause::Unreachable {
            return Err(failure);
        }
    }
    let until = Instant::now() + FETCH;
    loop {
        match order.poll_certificate(&POLLS).await.map_err(Failure::from) {
            Ok(chain) => return Ok(chain),
            Err(failure) if Instant::now() < until && failure.cause != Cause::Refused => {
                tracing::debug!(%failure, "the certificate is not there yet");
                tokio::time::sleep(FETCH_PAUSE).await;
            }
            Err(failure) => {
                let what = format!("the authority accepted the order but delivered no certificate: {failure}");
                return Err(Failure::new(Cause::Refused, what));
            }
        }
    }
}

/// Why the authority did not accept the proofs.
async fn refusal(order: &mut Order) -> Failure {
    let mut text = String::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if let Err(error) = authorization.refresh().await {
            write!(text, "{}", causes(&error)).ok();
            break;
        }
        let name = authorization.identifier().to_string();
        let problems = authorization.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
        for problem in problems {
            let comma = if text.is_empty() { "" } else { "; " };
            // Writing to a string never fails.
            write!(text, "{comma}{name}: {}", description(problem)).ok();
        }
    }
    let what = format!("the authority must reach this gateway at port 443 of each name, and did not: {text}");
    Failure::new(Cause::Refused, what)
}

/// Sends the library's requests over the same kind of client as all other calls.
struct Web(HttpClient);

impl instant_acme::HttpClient for Web {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let client = self.0.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            ask(client, Request::from_parts(parts, Full::new(body)))
                .await
                .map_err(|failure| Error::Other(failure.into()))
        })
    }
}

/// Sends one request and reads the whole answer, bounded in time and size. URLs that the directory names must be https, too.
async fn ask(client: HttpClient, request: Request<Full<Bytes>>) -> Result<BytesResponse, Failure> {
    if request.uri().scheme() != Some(&Scheme::HTTPS) {
        return Err(Failure::new(Cause::Refused, format!("{} is not an https:// address", request.uri())));
    }
    let host = request.uri().host().unwrap_or_default().to_owned();
    let answer = async {
        let (mut parts, body) = client.request(request).await.map_err(|error| causes(&error))?.into_parts();
        // The library would add any number of seconds to its clock.
        let pause = parts.headers.get(RETRY_AFTER).and_then(|pause| pause.to_str().ok()?.trim().parse::<u64>().ok());
        if pause.is_some_and(|pause| pause > LONGEST_PAUSE) {
            parts.headers.remove(RETRY_AFTER);
        }
        let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(|error| error.to_string())?;
        Ok(BytesResponse { parts, body: Box::new(body.to_bytes()) })
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, answer).await {
        Ok(answered) => answered.map_err(|error: String| Failure::setup(format!("cannot ask {host}: {error}"))),
        Err(_) => Err(Failure::setup(format!("no answer from {host} within {REQUEST_TIMEOUT:?}"))),
    }
}
