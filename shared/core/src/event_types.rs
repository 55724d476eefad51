//! The event types that Stream documents. Others occur too: Stream adds types, and apps define custom events.

/// The types of chat, including those of moderation that chat's hooks carry, in order.
pub const CHAT: [&str; 74] = [
    "campaign.completed",
    "campaign.started",
    "channel.created",
    "channel.deleted",
    "channel.frozen",
    "channel.hidden",
    "channel.max_streak_changed",
    "channel.muted",
    "channel.truncated",
    "channel.unfrozen",
    "channel.unmuted",
    "channel.updated",
    "channel.visible",
    "channel_batch_update.completed",
    "channel_batch_update.started",
    "export.bulk_image_moderation.error",
    "export.bulk_image_moderation.success",
    "export.channels.error",
    "export.channels.success",
    "export.moderation_logs.error",
    "export.moderation_logs.success",
    "export.review_queue.error",
    "export.review_queue.success",
    "export.users.error",
    "export.users.success",
    "flag.updated",
    "member.added",
    "member.removed",
    "member.updated",
    "message.deleted",
    "message.flagged",
    "message.new",
    "message.pending",
    "message.read",
    "message.unblocked",
    "message.undeleted",
    "message.unflagged",
    "message.updated",
    "moderation.custom_action",
    "moderation.flagged",
    "moderation.mark_reviewed",
    "moderation_check.completed",
    "moderation_rule.triggered",
    "notification.mark_unread",
    "notification.reminder_due",
    "notification.thread_message_new",
    "pending_message.deleted",
    "pending_message.passed_on",
    "reaction.deleted",
    "reaction.new",
    "reaction.updated",
    "reminder.created",
    "reminder.deleted",
    "reminder.updated",
    "review_queue_item.new",
    "review_queue_item.updated",
    "thread.updated",
    "user.banned",
    "user.deactivated",
    "user.deleted",
    "user.flagged",
    "user.messages.deleted",
    "user.muted",
    "user.reactivated",
    "user.unbanned",
    "user.unflagged",
    "user.unmuted",
    "user.unread_message_reminder",
    "user.updated",
    "user_group.created",
    "user_group.deleted",
    "user_group.member_added",
    "user_group.member_removed",
    "user_group.updated",
];

/// Types that a chat event hook cannot subscribe to: callbacks of pending messages have hooks of their own, and two are not sent.
const NOT_IN_HOOKS: [&str; 4] =
    ["message.unflagged", "pending_message.deleted", "pending_message.passed_on", "user.unflagged"];
/// Types of moderation that a chat event hook can subscribe to.
const MODERATION_IN_HOOKS: [&str; 6] = [
    "appeal.accepted",
    "appeal.created",
    "appeal.rejected",
    "moderation.analysis.failed",
    "moderation.image_analysis.complete",
    "moderation.text_analysis.complete",
];

/// The types besides `*` that a chat event hook can subscribe to: those of WHEvent in Stream's OpenAPI (August 2026).
pub fn in_hooks() -> impl Iterator<Item = &'static str> + Clone {
    let chat = CHAT.into_iter().filter(|name| !NOT_IN_HOOKS.contains(name));
    chat.chain(MODERATION_IN_HOOKS)
}

/// Prefixes of the types of Stream's other products, which an app may send to the same URL.
pub const OTHER_PRODUCTS: [&str; 6] = ["appeal.", "call.", "feeds.", "ingress.", "moderation.", "review_queue_item."];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_types_are_sorted_and_unique() {
        assert!(CHAT.is_sorted_by(|one, next| one < next));
        let mut in_hooks: Vec<_> = in_hooks().collect();
        in_hooks.sort_unstable();
        assert!(in_hooks.is_sorted_by(|one, next| one < next) && in_hooks.len() == 76, "{in_hooks:?}");
    }
}
