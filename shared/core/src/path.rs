//! The paths of the gateway's public port: what Stream's settings lead to.

pub const PUSH: &str = "/webhooks/stream/push";
pub const BEFORE_MESSAGE_SEND: &str = "/webhooks/stream/before-message-send";
pub const CUSTOM_COMMANDS: &str = "/webhooks/stream/custom-commands";
/// Callbacks of pending messages: their path says what a body of theirs does not, the type.
pub const PASS_ON_PENDING_MESSAGE: &str = "/webhooks/stream/pending-message/PassOnPendingMessage";
pub const DELETED_PENDING_MESSAGE: &str = "/webhooks/stream/pending-message/DeletedPendingMessage";
