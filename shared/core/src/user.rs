//! Whether an event contains data of a user. It serves erasing, so it errs on the side of yes.
//!
//! Stream puts users in many places (`user`, `members`, `mentioned_users`, `latest_reactions`, `target_user`, `created_by`, …), and
//! a body may be deeply nested, repeat a key, contain invalid UTF-8 or be truncated. So the body is walked token by token,
//! without a tree and without recursion, and unreadable parts are skipped.

use std::borrow::Cow;

/// What the value of a key can say about a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    Nothing,
    /// Users: objects with an `id`, or ids.
    User,
    /// One or several ids.
    Id,
}

/// Whether any place in the body names this user.
pub fn names_user(body: &[u8], id: &str) -> bool {
    let mut walk = Walk { rest: body, open: Vec::new(), key: Says::Nothing, at_key: false };
    while let Some((&byte, rest)) = walk.rest.split_first() {
        walk.rest = rest;
        match byte {
            b'"' => {
                let text = walk.string();
                if walk.at_key {
                    walk.key = says(&text, walk.container());
                    walk.at_key = false;
                } else if walk.value() != Says::Nothing && text == id {
                    return true;
                }
            }
            b'{' | b'[' => {
                let is_object = byte == b'{';
                walk.open.push((is_object, walk.value()));
                walk.at_key = is_object;
            }
            b'}' | b']' => {
                walk.open.pop();
                walk.at_key = false;
            }
            b',' => walk.at_key = walk.is_object(),
            _ => {}
        }
    }
    false
}

struct Walk<'b> {
    rest: &'b [u8],
    /// Open objects and lists, the innermost last: whether each is an object, and what it says.
    open: Vec<(bool, Says)>,
    /// What the latest key of the innermost object says.
    key: Says,
    /// Whether the next string is a key.
    at_key: bool,
}

impl<'b> Walk<'b> {
    fn is_object(&self) -> bool {
        self.open.last().is_some_and(|(is_object, _)| *is_object)
    }

    fn container(&self) -> Says {
        self.open.last().map_or(Says::Nothing, |(_, says)| *says)
    }

    /// What a value at this place says: in an object its key decides, in a list the list.
    fn value(&self) -> Says {
        if self.is_object() { self.key } else { self.container() }
    }

    /// The string whose opening quote was just read.
    fn string(&mut self) -> Cow<'b, str> {
        let mut end = 0;
        let mut is_escaped = false;
        while let Some(byte) = self.rest.get(end).filter(|byte| **byte != b'"') {
            let step = if *byte == b'\\' { 2 } else { 1 };
            is_escaped |= step == 2;
            end += step;
        }
        let (text, rest) = self.rest.split_at(end.min(self.rest.len()));
        self.rest = rest.get(1..).unwrap_or_default();
        let unescaped = || serde_json::from_slice::<String>(&[b"\"", text, b"\""].concat()).ok();
        match is_escaped.then(unescaped).flatten() {
            Some(text) => Cow::from(text),
            None => String::from_utf8_lossy(text),
        }
    }
}

/// What a key says in a container. Judged by the forms of Stream's names, so that names of later versions are recognised.
fn says(key: &str, container: Says) -> Says {
    const PEOPLE: [&str; 3] = ["member", "members", "thread_participants"];
    let is_id = (key == "id" && container == Says::User)
        || ["user_id", "user_ids", "_by_id"].iter().any(|end| key.ends_with(end));
    let is_user = PEOPLE.contains(&key) || ["user", "users", "_by"].iter().any(|end| key.ends_with(end));
    match (is_id, is_user) {
        (true, _) => Says::Id,
        (false, true) => Says::User,
        (false, false) => Says::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_table_of_places() {
        let deep = format!(r#"{}{{"user":{{"id":"ann"}}}}"#, r#"{"a":["#.repeat(50_000));
        let named: [&str; 20] = [
            r#"{"user":{"id":"ann"}}"#,
            r#"{"user_id":"ann"}"#,
            r#"{"user": { "name": "x", "id" : "ann" } }"#,
            r#"{"message":{"user":{"id":"ann"}}}"#,
            r#"{"member":{"user_id":"ann"}}"#,
            r#"{"members":[{"user":{"id":"bob"}},{"user":{"id":"ann"}}]}"#,
            r#"{"message":{"mentioned_users":[{"id":"bob"},{"id":"ann"}]}}"#,
            r#"{"message":{"mentioned_users":["ann"]}}"#,
            r#"{"message":{"latest_reactions":[{"user":{"id":"ann"}}]}}"#,
            r#"{"reaction":{"user_id":"ann"}}"#,
            r#"{"target_user":{"id":"ann"}}"#,
            r#"{"target_user_id":"ann"}"#,
            r#"{"channel":{"created_by":{"id":"ann"}}}"#,
            r#"{"created_by_id":"ann"}"#,
            r#"{"thread_participants":[{"id":"ann"}]}"#,
            r#"{"user":{"id":"ann"},"user":{"id":"bob"}}"#,
            r#"{"user":{"id":"bob","id":"ann"}}"#,
            r#"{"\u0075ser":{"\u0069d":"\u0061nn"}}"#,
            r#"{"user":{"id":"ann"#,
            &deep,
        ];
        for body in named {
            assert!(names_user(body.as_bytes(), "ann"), "{}", &body[..body.len().min(80)]);
            assert!(!names_user(body.as_bytes(), "eve"), "{}", &body[..body.len().min(80)]);
        }
        assert!(names_user(b"{\"text\":\"\xff\",\"user\":{\"id\":\"ann\"}}", "ann"));
        let others: [&str; 8] = [
            r#"{"message":{"id":"ann","text":"ann"}}"#,
            r#"{"channel":{"id":"ann"},"cid":"messaging:ann"}"#,
            r#"{"user":{"name":"ann","id":"bob"}}"#,
            r#"{"text":"\"user\":{\"id\":\"ann\"}"}"#,
            r#"{"user":{"id":"ann2"}}"#,
            r#"{"user":{"id":7},"x":"ann"}"#,
            r#"["ann"]"#,
            "",
        ];
        for body in others {
            assert!(!names_user(body.as_bytes(), "ann"), "{body}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(body in proptest::collection::vec(any::<u8>(), 0..200), id in any::<String>()) {
            names_user(&body, &id);
            names_user(&[br#"{"user":{"id":""#.as_slice(), &body].concat(), &id);
        }

        /// Any id is found in the form that a JSON writer gives it.
        #[test]
        fn any_id_is_found(id in any::<String>(), text in any::<String>()) {
            let body = serde_json::json!({"text": text, "members": [{"user": {"name": text, "id": id}}]}).to_string();
            prop_assert!(names_user(body.as_bytes(), &id));
        }
    }
}
