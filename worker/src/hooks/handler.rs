//! Which handler answers which hook.

use super::{Answer, BeforeMessageSend, Command};
use crate::handler::{BoxFuture, HandlerError};
use bytes::Bytes;
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use streamgate_core::{
    envelope::Envelope,
    hook::{self, SignedCommand},
    id::Kind,
};

use tokio::time::Instant;

/// A hook that waits for its answer, with the bytes as they were signed.
#[derive(Clone, Debug)]
pub struct Hook {
    envelope: Envelope,
    until: Instant,
}

impl Hook {
    pub(super) fn new(envelope: Envelope, within: Duration) -> Hook {
        Hook { envelope, until: Instant::now() + within }
    }

    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// The deadline, after which the policy answers instead.
    pub fn until(&self) -> Instant {
        self.until
    }

    pub(super) fn into_envelope(self) -> Envelope {
        self.envelope
    }

    /// The command's name from the signed body; only if the body has none, the one that the gateway took from the URL. Empty
    /// if the signed one is not a valid name.
    pub fn command(&self) -> String {
        match hook::command(&self.envelope.body) {
            SignedCommand::Name(name) => name.into_owned(),
            SignedCommand::Absent => self.envelope.event_type.clone(),
            SignedCommand::Malformed => String::new(),
        }
    }
}

/// Answers hooks with a JSON object whose `message` is an object or null. The kind's policy answers after a failure, whose
/// text is logged.
pub trait HookHandler: Send + Sync + 'static {
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>>;
}

/// Adapts a typed function from a hook to an answer.
#[derive(Clone, Copy, Debug)]
pub struct AnsweredBy<F, H>(F, std::marker::PhantomData<fn(H)>);

impl<F, R> AnsweredBy<F, BeforeMessageSend>
where
    F: Fn(BeforeMessageSend) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Answer, HandlerError>> + Send + 'static,
{
    pub fn moderation(handler: F) -> Arc<dyn HookHandler> {
        Arc::new(AnsweredBy(handler, std::marker::PhantomData::<fn(BeforeMessageSend)>))
    }
}

impl<F, R> AnsweredBy<F, Command>
where
    F: Fn(Command) -> R + Send + Sync + 'static,
    R: Future<Output = Result<Answer, HandlerError>> + Send + 'static,
{
    pub fn command(handler: F) -> Arc<dyn HookHandler> {
        Arc::new(AnsweredBy(handler, std::marker::PhantomData::<fn(Command)>))
    }
}

impl<F, H, R> HookHandler for AnsweredBy<F, H>
where
    F: Fn(H) -> R + Send + Sync + 'static,
    H: From<Hook> + 'static,
    R: Future<Output = Result<Answer, HandlerError>> + Send + 'static,
{
    fn answer(&self, hook: Hook) -> BoxFuture<Result<Bytes, HandlerError>> {
        let answer = self.0(hook.into());
        Box::pin(async { answer.await.map(Answer::into_bytes) })
    }
}

/// All handlers of hooks.
#[derive(Clone, Default)]
pub struct Hooks {
    pub before_message_send: Option<Arc<dyn HookHandler>>,
    /// By command name.
    pub commands: HashMap<String, Arc<dyn HookHandler>>,
    /// For every other command.
    pub any_command: Option<Arc<dyn HookHandler>>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks")
            .field("before_message_send", &self.before_message_send.is_some())
            .field("commands", &self.commands.keys())
            .field("any_command", &self.any_command.is_some())
            .finish()
    }
}

impl Hooks {
    /// Whether no hook has a handler.
    pub fn is_empty(&self) -> bool {
        self.before_message_send.is_none() && self.commands.is_empty() && self.any_command.is_none()
    }

    /// The hooks that have a handler, for people to read.
    pub fn names(&self) -> Vec<String> {
        let moderation = self.before_message_send.iter().map(|_| "before-message-send".to_owned());
        let mut commands: Vec<_> = self.commands.keys().map(|name| format!("/{name}")).collect();
        commands.sort();
        moderation.chain(commands).chain(self.any_command.iter().map(|_| "every command".to_owned())).collect()
    }

    pub(super) fn pick(&self, hook: &Hook) -> Option<&Arc<dyn HookHandler>> {
        match hook.envelope.kind {
            Kind::BeforeMessageSend => self.before_message_send.as_ref(),
            Kind::CustomCommand => {
                let name = hook.command();
                let any = self.any_command.as_ref().filter(|_| hook::is_command_name(&name));
                self.commands.get(&name).or(any)
            }
            // Pushes come through the queue of events.
            Kind::Push => None,
        }
    }
}
