//! Bodies of the shapes that Stream documents, for every kind of webhook and every event type.

mod parts;

use super::KindArg;
use jiff::Timestamp;
use parts::{BEFORE, html, moderator, request_info, with};
use serde_json::{Map, Value, json};

/// The people, places and texts that bodies are made of.
#[derive(Clone, Debug)]
pub(super) struct Cast {
    pub(super) user: String,
    /// Type and id: `messaging`, `general`.
    pub(super) channel: (String, String),
    pub(super) text: String,
    /// The event's type, or the command's name without its slash.
    pub(super) event_type: String,
    /// The text after the command's name.
    pub(super) args: String,
    /// The button that was clicked, or the inputs.
    pub(super) form: Map<String, Value>,
}

/// One webhook with that cast.
#[derive(Debug)]
pub(super) struct Sample<'c> {
    pub(super) cast: &'c Cast,
    /// Id of the message, or of the event's subject.
    pub(super) id: &'c str,
    /// `None` if the body has to be the same each time.
    pub(super) now: Option<Timestamp>,
}

impl Sample<'_> {
    pub(super) fn body(&self, kind: KindArg) -> Value {
        match kind {
            KindArg::Push => self.event(),
            KindArg::BeforeMessageSend => self.before_message_send(),
            KindArg::CustomCommand => self.command(),
        }
    }

    /// The message is not stored yet, so it has neither an id nor dates.
    fn before_message_send(&self) -> Value {
        let message = json!({
            "id": "",
            "text": self.cast.text,
            "html": "",
            "type": "regular",
            "attachments": [],
            "mentioned_users": [],
            "silent": false,
        });
        // Makes two requests differ.
        let active = json!({"last_active": self.now.map(|now| now.to_string())});
        json!({
            "message": message,
            "user": with(self.user(), active),
            "channel": with(self.channel(), json!({"config": self.channel_config()})),
            "request_info": request_info(),
        })
    }

    fn command(&self) -> Value {
        let Cast { event_type, args, form, .. } = self.cast;
        let mut message = self.message();
        let text = format!("/{event_type} {args}");
        message["html"] = html(text.trim_end());
        message["text"] = text.trim_end().into();
        message["command"] = event_type.as_str().into();
        message["args"] = args.as_str().into();
        let mut body = json!({"message": message, "user": self.user(), "request_info": request_info()});
        if !form.is_empty() {
            body["form_data"] = form.clone().into();
        }
        body
    }

    fn event(&self) -> Value {
        let event_type = self.cast.event_type.as_str();
        // A callback has its own URL, and no type.
        if event_type.starts_with("pending_message.") {
            let metadata = json!({"order": "17"});
            return json!({"message": self.message(), "metadata": metadata, "request_info": request_info()});
        }
        let mut event = json!({"type": event_type});
        if let (Some(now), Some(event)) = (self.now, event.as_object_mut()) {
            event.insert("created_at".to_owned(), now.to_string().into());
        }
        let family = event_type.split_once('.').map_or(event_type, |(family, _)| family);
        let parts = match family {
            "message" => self.of_message(event_type),
            "reaction" => with(
                self.in_channel(),
                json!({"message_id": self.id, "message": self.message(), "reaction": self.reaction(), "user": self.user()}),
            ),
            "member" => with(self.in_channel(), json!({"member": self.member(), "user": self.user()})),
            "channel" => self.of_channel(event_type),
            "user" => self.of_user(event_type),
            "user_group" => self.of_user_group(event_type),
            "notification" => self.of_notification(event_type),
            "reminder" => self.of_reminder(),
            "thread" => with(self.place(), json!({"thread": self.thread(), "user": self.user()})),
            "flag" => json!({"CreatedBy": moderator(), "Message": self.message(), "User": self.user()}),
            "moderation" => self.of_moderation(event_type),
            "moderation_check" => json!({
                "entity_id": self.id,
                "entity_type": "stream:chat:v1:message",
                "recommended_action": "flag",
                "review_queue_item_id": self.id,
            }),
            "moderation_rule" => json!({
                "entity_id": self.id,
                "entity_type": "stream:chat:v1:message",
                "user_id": self.cast.user,
                "triggered_actions": ["flag_user"],
                "rule": {"id": "repeated-spam", "name": "Repeated spam", "description": "", "type": "user"},
                "violation_number": 1,
            }),
            "review_queue_item" => json!({
                "review_queue_item": self.review_item(),
                "action": {
                    "id": self.id,
                    "type": "mark_reviewed",
                    "reason": "",
                    "reporter_type": "moderator",
                    "user_id": "streamgate-moderator",
                    "target_user_id": self.cast.user,
                    "ai_providers": [],
                    "custom": {},
                    "created_at": BEFORE,
                },
                "flags": [self.flag()],
            }),
            "export" => self.of_export(event_type),
            "channel_batch_update" => json!({
                "task_id": self.id,
                "operation": "addMembers",
                "status": event_type.trim_start_matches("channel_batch_update."),
                "batch_created_at": BEFORE,
                "finished_at": BEFORE,
                "success_channels_count": 1,
                "failed_channels": [],
            }),
            "campaign" => json!({"campaign": self.campaign(event_type)}),
            // A custom event of the app.
            _ => json!({
                "custom": {"id": self.id, "text": self.cast.text, "user_id": self.cast.user, "cid": self.cid()},
                "received_at": self.now.map(|now| now.to_string()),
            }),
        };
        let event = with(event, parts);
        if matches!(family, "message" | "member" | "channel") {
            return with(event, json!({"request_info": request_info()}));
        }
        event
    }

    fn of_message(&self, event_type: &str) -> Value {
        if event_type == "message.read" {
            let read = json!({"channel": self.channel(), "user": self.reader(), "last_read_message_id": self.id});
            return with(self.place(), read);
        }
        let mut event = self.in_channel();
        let mut message = self.message();
        let mut user = self.user();
        match event_type {
            "message.new" => {
                user = self.reader();
                event["watcher_count"] = 1.into();
            }
            "message.updated" => {
                let changed = json!({"text": true, "html": true, "attachments": false, "custom": false});
                event["message_update"] = json!({"old_text": "as it was before", "change_set": changed});
            }
            "message.deleted" => {
                message["type"] = "deleted".into();
                message["deleted_at"] = self.now.map(|now| now.to_string()).into();
                event["hard_delete"] = false.into();
                event["deleted_for_me"] = false.into();
            }
            "message.flagged" | "message.unflagged" => {
                user = moderator();
                event["total_flags"] = i32::from(event_type == "message.flagged").into();
                event["reason"] = "spam".into();
            }
            "message.pending" => {
                event["method"] = "PassOnPendingMessage".into();
                event["metadata"] = json!({"order": "17"});
            }
            _ => {}
        }
        event["message_id"] = self.id.into();
        with(event, json!({"message": message, "user": user}))
    }

    fn of_channel(&self, event_type: &str) -> Value {
        match event_type {
            "channel.frozen" | "channel.unfrozen" => self.place(),
            "channel.max_streak_changed" => json!({"custom": {}}),
            "channel.muted" | "channel.unmuted" => json!({
                "mute": {"user": self.user(), "channel": self.channel(), "created_at": BEFORE, "updated_at": BEFORE},
                "user": self.user(),
            }),
            "channel.hidden" => with(self.in_channel(), json!({"clear_history": false, "user": self.user()})),
            _ => with(self.in_channel(), json!({"user": self.user()})),
        }
    }

    fn of_user(&self, event_type: &str) -> Value {
        let user = json!({"user": self.user()});
        let by = |more: Value| with(json!({"user": self.user(), "created_by": moderator()}), more);
        match event_type {
            "user.banned" => with(
                self.place(),
                by(json!({"reason": "spam", "shadow": false, "total_bans": 1, "expiration": "2030-01-01T00:00:00Z"})),
            ),
            "user.unbanned" => with(self.place(), by(json!({"shadow": false}))),
            "user.deactivated" | "user.reactivated" => by(json!({})),
            "user.deleted" => with(
                user,
                json!({
                    "hard_delete": false,
                    "mark_messages_deleted": false,
                    "delete_conversation_channels": false,
                    "delete_user": "soft",
                    "delete_messages": "",
                    "delete_conversation": "",
                }),
            ),
            "user.messages.deleted" => with(self.place(), with(user, json!({"hard_delete": false}))),
            "user.muted" | "user.unmuted" => {
                json!({"user": moderator(), "target_user": self.user(), "target_users": [self.user()]})
            }
            "user.flagged" | "user.unflagged" => json!({
                "user": moderator(),
                "target_user": self.user(),
                "reason": "spam",
                "total_flags": i32::from(event_type == "user.flagged"),
            }),
            "user.unread_message_reminder" => {
                let unread = json!({"channel": self.channel(), "messages": [self.message()]});
                with(user, json!({"channels": {self.cid(): unread}}))
            }
            _ => user,
        }
    }

    fn of_user_group(&self, event_type: &str) -> Value {
        let group = json!({
            "id": "streamgate-group",
            "name": "Streamgate group",
            "created_by": "streamgate-moderator",
            "created_at": BEFORE,
            "updated_at": BEFORE,
        });
        let event = json!({"user_group": group, "user": moderator()});
        if event_type.starts_with("user_group.member_") {
            with(event, json!({"members": [self.cast.user]}))
        } else {
            event
        }
    }

    fn of_notification(&self, event_type: &str) -> Value {
        match event_type {
            "notification.reminder_due" => self.of_reminder(),
            "notification.mark_unread" => with(
                self.in_channel(),
                json!({
                    "user": self.reader(),
                    "first_unread_message_id": self.id,
                    "last_read_at": BEFORE,
                    "unread_messages": 1,
                    "unread_channels": 1,
                    "unread_count": 1,
                    "total_unread_count": 1,
                }),
            ),
            _ => with(
                self.in_channel(),
                json!({
                    "message_id": self.id,
                    "thread_id": "streamgate-thread",
                    "message": with(self.message(), json!({"parent_id": "streamgate-thread"})),
                    "thread_participants": [self.user()],
                    "unread_threads": 1,
                    "unread_thread_messages": 1,
                    "watcher_count": 1,
                }),
            ),
        }
    }

    fn of_reminder(&self) -> Value {
        json!({
            "cid": self.cid(),
            "message_id": self.id,
            "user_id": self.cast.user,
            "reminder": {
                "channel_cid": self.cid(),
                "message_id": self.id,
                "user_id": self.cast.user,
                "message": self.message(),
                "user": self.user(),
                "remind_at": BEFORE,
                "created_at": BEFORE,
                "updated_at": BEFORE,
            },
        })
    }

    fn of_moderation(&self, event_type: &str) -> Value {
        match event_type {
            "moderation.custom_action" => json!({
                "action_id": "escalate",
                "action_options": {},
                "review_queue_item": self.review_item(),
                "message": self.message(),
            }),
            "moderation.mark_reviewed" => json!({"item": self.review_item(), "message": self.message()}),
            _ => json!({"content_type": "message", "object_id": self.id}),
        }
    }

    fn of_export(&self, event_type: &str) -> Value {
        let task = json!({"task_id": self.id, "started_at": BEFORE, "finished_at": BEFORE});
        let outcome = if event_type.ends_with(".error") {
            json!({"error": "the export failed"})
        } else {
            json!({"url": "https://example.com/export.json"})
        };
        with(task, outcome)
    }

    fn campaign(&self, event_type: &str) -> Value {
        json!({
            "id": self.id,
            "name": "Streamgate campaign",
            "description": "",
            "status": event_type.trim_start_matches("campaign."),
            "sender_id": self.cast.user,
            "sender_mode": "exclude",
            "sender_visibility": "hidden",
            "create_channels": false,
            "show_channels": false,
            "skip_push": false,
            "skip_webhook": false,
            "segment_ids": [],
            "segments": [],
            "user_ids": [],
            "users": [],
            "message_template": {"text": self.cast.text},
            "created_at": BEFORE,
            "updated_at": BEFORE,
        })
    }
}
