//! Talks to an ACME authority (RFC 8555): an account, then an order proved by TLS-ALPN-01 (RFC 8737).

use super::challenge::Challenges;
use super::kept::{Account as KeptAccount, Kept, KeptError};
use super::schedule::Cause;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use instant_acme::{
    Account, AuthorizationStatus, BodyWrapper, BytesResponse, ChallengeType, Error, Identifier, NewAccount, NewOrder,
    Order, OrderStatus, Problem, RetryPolicy,
};
use std::fmt::Write;
use std::pin::Pin;
use std::time::Duration;
use streamgate_service::config::AcmeConfig;
use streamgate_service::http_client::{self, HttpClient, causes};

/// For one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// For the authority's checks of all names, and then for its signature.
const POLLS: RetryPolicy = RetryPolicy::new().timeout(Duration::from_secs(180));
/// Chains have some kilobytes, of up to 100 names a few more.
const MOST_ANSWER: usize = 1 << 20;
/// Most characters of what an authority says that stand in a log line or in /readyz.
const MOST_WORDS: usize = 400;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(super) struct Failure {
    pub(super) cause: Cause,
    what: String,
}

impl Failure {
    fn new(cause: Cause, what: impl std::fmt::Display) -> Failure {
        // It may come from the network, and goes to logs and /readyz.
        let what: String = what.to_string().chars().filter(|letter| !letter.is_control()).take(MOST_WORDS).collect();
        Failure { cause, what }
    }

    pub(super) fn setup(error: impl std::fmt::Display) -> Failure {
        Failure::new(Cause::Unreachable, error)
    }

    /// Of the authority: an account that it has forgotten, or closed.
    fn problem(problem: &Problem) -> Failure {
        let cause = match problem.r#type.as_deref().and_then(|kind| kind.rsplit(':').next()) {
            Some("badNonce") => Cause::Nonce,
            Some("rateLimited") => Cause::RateLimited,
            Some("accountDoesNotExist") => Cause::Account,
            Some("serverInternal") => Cause::Unreachable,
            Some(_) | None => Cause::Refused,
        };
        Failure::new(cause, words(problem))
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

impl From<KeptError> for Failure {
    fn from(error: KeptError) -> Failure {
        Failure::setup(error)
    }
}

/// The authority's own words.
fn words(problem: &Problem) -> String {
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

/// Says whether the directory answers as one.
pub(super) async fn answers(config: &AcmeConfig) -> Result<(), Failure> {
    let client = http_client::client(config.ca.as_deref()).map_err(Failure::setup)?;
    let request = Request::get(&config.directory).body(Full::default()).map_err(Failure::setup)?;
    let mut answer = ask(client, request).await?;
    let body = answer.body.into_bytes().await.map_err(Failure::setup)?;
    let directory: serde_json::Value = serde_json::from_slice(&body).map_err(Failure::setup)?;
    match directory.get("newOrder") {
        Some(_) => Ok(()),
        None => Err(Failure::setup("it answers, but not as the directory of an ACME authority")),
    }
}

/// The account that is kept, or a new one, which is kept before it is used.
pub(super) async fn account(config: &AcmeConfig, kept: &Kept) -> Result<Account, Failure> {
    let known = match kept.account() {
        Ok(known) => known,
        Err(error @ KeptError::Account { .. }) => {
            tracing::warn!(%error, "making a new account");
            None
        }
        Err(error) => return Err(error.into()),
    };
    let Some(known) = known else { return new_account(config, kept).await };
    let kept_contact = known.contact.clone();
    let account = Account::builder_with_http(web(config)?).from_credentials(known.credentials).await?;
    if kept_contact != config.contact {
        account.update_contacts(&contacts(config).iter().map(String::as_str).collect::<Vec<_>>()).await?;
        // Read again: the library takes the credentials and does not give them back.
        if let Some(known) = kept.account()? {
            kept.keep_account(&KeptAccount { contact: config.contact.clone(), ..known }).await?;
        }
    }
    Ok(account)
}

/// Replaces the account that is kept.
pub(super) async fn new_account(config: &AcmeConfig, kept: &Kept) -> Result<Account, Failure> {
    let contacts = contacts(config);
    let contacts: Vec<_> = contacts.iter().map(String::as_str).collect();
    let new = NewAccount { contact: &contacts, terms_of_service_agreed: true, only_return_existing: false };
    let builder = Account::builder_with_http(web(config)?);
    let (account, credentials) = builder.create(&new, config.directory.clone(), None).await?;
    kept.keep_account(&KeptAccount { contact: config.contact.clone(), credentials }).await?;
    tracing::info!(directory = config.directory, "made an account with the certificate authority");
    Ok(account)
}

fn contacts(config: &AcmeConfig) -> Vec<String> {
    config.contact.iter().map(|mail| format!("mailto:{mail}")).collect()
}

/// An order, begun. An authority that refuses this for the account's sake says so here.
pub(super) async fn order(account: &Account, domains: &[String]) -> Result<Order, Failure> {
    let names: Vec<_> = domains.iter().cloned().map(Identifier::Dns).collect();
    account.new_order(&NewOrder::new(&names)).await.map_err(|error| {
        if let Error::Api(problem) = &error {
            let kind = problem.r#type.as_deref().unwrap_or_default();
            // Of an account that was deactivated (RFC 8555, section 7.3.6).
            if kind.ends_with(":unauthorized") {
                return Failure::new(Cause::Account, words(problem));
            }
        }
        error.into()
    })
}

/// PEM: a new key, then the chain.
pub(super) async fn certificate(order: &mut Order, challenges: &Challenges) -> Result<String, Failure> {
    // Taken back when this ends, however it does.
    let mut proofs = challenges.proofs();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        match authorization.status {
            // Proved lately, for another order.
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            AuthorizationStatus::Invalid
            | AuthorizationStatus::Revoked
            | AuthorizationStatus::Expired
            | AuthorizationStatus::Deactivated => {
                let what = format!("the authorization of {} is not open", authorization.identifier());
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
    let key = order.finalize().await?;
    let chain = order.poll_certificate(&POLLS).await?;
    Ok(key + &chain)
}

/// Why the authority did not accept the proofs.
async fn refusal(order: &mut Order) -> Failure {
    let mut text = String::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if let Err(error) = authorization.refresh().await {
            return error.into();
        }
        let name = authorization.identifier().to_string();
        let problems = authorization.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
        for problem in problems {
            let comma = if text.is_empty() { "" } else { "; " };
            // Writing to a string never fails.
            write!(text, "{comma}{name}: {}", words(problem)).ok();
        }
    }
    let what = format!("the authority must reach this gateway at port 443 of each name, and did not: {text}");
    Failure::new(Cause::Refused, what)
}

/// The library's requests, over the client that all calls use.
struct Web(HttpClient);

fn web(config: &AcmeConfig) -> Result<Box<dyn instant_acme::HttpClient>, Failure> {
    Ok(Box::new(Web(http_client::client(config.ca.as_deref()).map_err(Failure::setup)?)))
}

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

/// One request and its whole answer, bounded in time and size.
async fn ask(client: HttpClient, request: Request<Full<Bytes>>) -> Result<BytesResponse, Failure> {
    let host = request.uri().host().unwrap_or_default().to_owned();
    let answer = async {
        let (parts, body) = client.request(request).await.map_err(|error| causes(&error))?.into_parts();
        let body = Limited::new(body, MOST_ANSWER).collect().await.map_err(|error| error.to_string())?;
        Ok(BytesResponse { parts, body: Box::new(body.to_bytes()) })
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, answer).await {
        Ok(answered) => answered.map_err(|error: String| Failure::setup(format!("cannot ask {host}: {error}"))),
        Err(_) => Err(Failure::setup(format!("no answer from {host} within {REQUEST_TIMEOUT:?}"))),
    }
}
