//! Building blocks of bodies: channels, users, messages and their attachments.

use super::Sample;
use serde_json::{Value, json};

/// Creation time of everything but the event itself.
pub(super) const BEFORE: &str = "2026-01-01T00:00:00Z";

impl Sample<'_> {
    pub(super) fn cid(&self) -> String {
        let (channel_type, id) = &self.cast.channel;
        format!("{channel_type}:{id}")
    }

    /// The channel's ids.
    pub(super) fn place(&self) -> Value {
        let (channel_type, id) = &self.cast.channel;
        json!({"cid": self.cid(), "channel_type": channel_type, "channel_id": id})
    }

    /// The channel's ids, and the channel with its members.
    pub(super) fn in_channel(&self) -> Value {
        with(self.place(), json!({"channel": self.channel(), "members": [self.member()]}))
    }

    pub(super) fn channel(&self) -> Value {
        let (channel_type, id) = &self.cast.channel;
        json!({
            "cid": self.cid(),
            "type": channel_type,
            "id": id,
            "name": id,
            "member_count": 1,
            "frozen": false,
            "disabled": false,
            "created_by": self.user(),
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }

    pub(super) fn channel_config(&self) -> Value {
        json!({
            "name": self.cast.channel.0,
            "typing_events": true,
            "read_events": true,
            "connect_events": true,
            "custom_events": true,
            "search": true,
            "reactions": true,
            "replies": true,
            "quotes": true,
            "mutes": true,
            "uploads": true,
            "url_enrichment": true,
            "push_notifications": true,
            "max_message_length": 5000,
            "automod": "disabled",
            "automod_behavior": "flag",
            "commands": [],
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }

    pub(super) fn user(&self) -> Value {
        user(&self.cast.user)
    }

    /// A user with unread counts.
    pub(super) fn reader(&self) -> Value {
        let counts = json!({
            "channel_last_read_at": BEFORE,
            "channel_unread_count": 0,
            "total_unread_count": 0,
            "unread_channels": 0,
            "unread_count": 0,
        });
        with(self.user(), counts)
    }

    pub(super) fn member(&self) -> Value {
        json!({
            "user_id": self.cast.user,
            "user": self.reader(),
            "channel_role": "channel_member",
            "role": "member",
            "banned": false,
            "shadow_banned": false,
            "notifications_muted": false,
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }

    pub(super) fn message(&self) -> Value {
        let mut message = json!({
            "id": self.id,
            "cid": self.cid(),
            "text": self.cast.text,
            "html": html(&self.cast.text),
            "type": "regular",
            "user": self.user(),
            "attachments": [],
            "mentioned_users": [],
            "latest_reactions": [],
            "own_reactions": [],
            "reaction_counts": {},
            "reaction_scores": {},
            "reply_count": 0,
            "deleted_reply_count": 0,
            "pinned": false,
            "shadowed": false,
            "silent": false,
        });
        if let Some(now) = self.now {
            message["created_at"] = now.to_string().into();
            message["updated_at"] = now.to_string().into();
        }
        message
    }

    pub(super) fn reaction(&self) -> Value {
        json!({
            "message_id": self.id,
            "type": "like",
            "score": 1,
            "user_id": self.cast.user,
            "user": self.user(),
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }

    pub(super) fn thread(&self) -> Value {
        json!({
            "channel_cid": self.cid(),
            "parent_message_id": self.id,
            "title": self.cast.text,
            "created_by_user_id": self.cast.user,
            "participant_count": 1,
            "active_participant_count": 1,
            "reply_count": 1,
            "custom": {},
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }

    pub(super) fn flag(&self) -> Value {
        json!({
            "entity_id": self.id,
            "entity_type": "stream:chat:v1:message",
            "entity_creator_id": self.cast.user,
            "user_id": "streamgate-moderator",
            "type": "user_report",
            "reason": "spam",
            "labels": ["spam"],
            "result": [],
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }

    pub(super) fn review_item(&self) -> Value {
        json!({
            "id": self.id,
            "entity_id": self.id,
            "entity_type": "stream:chat:v1:message",
            "entity_creator_id": self.cast.user,
            "recommended_action": "flag",
            "latest_moderator_action": "",
            "reviewed_by": "",
            "status": "unreviewed",
            "severity": 1,
            "ai_text_severity": "low",
            "flags_count": 1,
            "escalated": false,
            "actions": [],
            "bans": [],
            "flags": [self.flag()],
            "languages": ["en"],
            "message": self.message(),
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }
}

fn user(id: &str) -> Value {
    json!({
        "id": id,
        "name": id,
        "role": "user",
        "language": "",
        "banned": false,
        "online": true,
        "teams": [],
        "blocked_user_ids": [],
        "created_at": BEFORE,
        "updated_at": BEFORE,
    })
}

/// The moderator.
pub(super) fn moderator() -> Value {
    with(user("streamgate-moderator"), json!({"role": "moderator"}))
}

pub(super) fn request_info() -> Value {
    json!({"type": "client", "ip": "192.0.2.1", "user_agent": "streamgate send", "sdk": ""})
}

pub(super) fn html(text: &str) -> Value {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    if text.is_empty() { text.into() } else { format!("<p>{text}</p>\n").into() }
}

/// Merges the fields of `more` into an object.
pub(super) fn with(mut object: Value, more: Value) -> Value {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
    object
}
