//! The paths of the gateway's public port, to which Stream's settings point.

pub const PUSH: &str = "/webhooks/stream/push";
pub const BEFORE_MESSAGE_SEND: &str = "/webhooks/stream/before-message-send";
pub const CUSTOM_COMMANDS: &str = "/webhooks/stream/custom-commands";
/// Callbacks of pending messages: their path implies the type, which their body lacks.
pub const PASS_ON_PENDING_MESSAGE: &str = "/webhooks/stream/pending-message/PassOnPendingMessage";
pub const DELETED_PENDING_MESSAGE: &str = "/webhooks/stream/pending-message/DeletedPendingMessage";
