//! The user of a hook's request. Stream writes the fields that an app has set, the name among them, either beside the id or in an
//! object `Custom`, as in the examples of its documentation.

use streamgate_core::fields::Fields;

pub(super) fn id(request: &Fields) -> Option<String> {
    request.object("user")?.text("id")
}

/// The user's name, or the id where there is none.
pub(super) fn name(request: &Fields) -> Option<String> {
    let user = request.object("user")?;
    let named = |fields: &Fields| fields.text("name").filter(|name| !name.is_empty());
    let custom = || ["Custom", "custom"].iter().find_map(|field| named(&user.object(field)?));
    named(&user).or_else(custom).or_else(|| user.text("id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_in_either_shape() {
        let named = |user: &str| name(&Fields::parse(format!("{{\"user\":{user}}}").as_bytes()).unwrap());
        for (user, expected) in [
            (r#"{"id":"ann","name":"Ann"}"#, Some("Ann")),
            (r#"{"id":"ann","Custom":{"name":"Ann"}}"#, Some("Ann")),
            (r#"{"id":"ann","custom":{"name":"Ann"}}"#, Some("Ann")),
            (r#"{"id":"ann","name":"","Custom":{"name":"Ann"}}"#, Some("Ann")),
            (r#"{"id":"ann","name":"Ann","Custom":{"name":"Other"}}"#, Some("Ann")),
            (r#"{"id":"ann","Custom":{"name":7}}"#, Some("ann")),
            (r#"{"id":"ann","Custom":"Ann"}"#, Some("ann")),
            (r#"{"id":"ann"}"#, Some("ann")),
            ("{}", None),
            ("null", None),
        ] {
            assert_eq!(named(user).as_deref(), expected, "{user}");
        }
    }
}
