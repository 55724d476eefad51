//! Synchronous hooks: which handler answers which, and the loop that runs them. They have capacity of their own, so that a
//! backlog of events never delays an answer.

mod answer;
mod command;
mod forward;
mod handler;
mod moderation;
mod reply;
mod request;
mod run;
mod screen;

pub use answer::{Answer, Button, Style};
pub use command::Command;
pub use forward::ForwardHook;
pub use handler::{AnsweredBy, Hook, HookHandler, Hooks};
pub use moderation::BeforeMessageSend;
pub use reply::Reply;
pub use request::Unreadable;
pub use run::{CallPolicy, CallWorker};
pub use screen::Screen;
