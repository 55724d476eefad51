//! Texts with placeholders in braces: `Ticket for {user}: {args}`.

/// The value of a placeholder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The command's name.
    Command,
    /// The text after the command's name.
    Args,
    /// The user's name, or the id of a user without a name.
    User,
}

const SLOTS: [(&str, Slot); 3] = [("command", Slot::Command), ("args", Slot::Args), ("user", Slot::User)];

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Slot(Slot),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

/// Why a text is not a valid template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("has a {{ without a }}; write a literal brace twice")]
    Open,
    #[error("has a }} without a {{; write a literal brace twice")]
    Close,
    #[error("has the unknown placeholder {{{0}}}; the valid ones are {{command}}, {{args}} and {{user}}")]
    Unknown(String),
}

impl Template {
    pub fn parse(text: &str) -> Result<Template, TemplateError> {
        let (mut pieces, mut literal, mut rest) = (Vec::new(), String::new(), text);
        while let Some(place) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(place);
            literal.push_str(before);
            if let Some(after) = from.strip_prefix("{{").or_else(|| from.strip_prefix("}}")) {
                literal.push_str(&from[..1]);
                rest = after;
                continue;
            }
            let inner = from.strip_prefix('{').ok_or(TemplateError::Close)?;
            let (name, after) = inner.split_once('}').ok_or(TemplateError::Open)?;
            let slot = SLOTS.iter().find(|(known, _)| *known == name);
            let (_, slot) = slot.ok_or_else(|| TemplateError::Unknown(name.to_owned()))?;
            pieces.push(Piece::Text(std::mem::take(&mut literal)));
            pieces.push(Piece::Slot(*slot));
            rest = after;
        }
        literal.push_str(rest);
        pieces.push(Piece::Text(literal));
        Ok(Template(pieces))
    }

    /// Inserts values as they are; braces in them are not placeholders.
    pub fn fill(&self, value: impl Fn(Slot) -> String) -> String {
        let piece = |piece: &Piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Slot(slot) => value(*slot),
        };
        self.0.iter().map(piece).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_filled_once() {
        let fill = |text: &str| Template::parse(text).map(|it| it.fill(|slot| format!("<{slot:?} {{args}}>")));
        assert_eq!(fill("").unwrap(), "");
        assert_eq!(fill("plain").unwrap(), "plain");
        assert_eq!(fill("{user}: {args}{command}!").unwrap(), "<User {args}>: <Args {args}><Command {args}>!");
        assert_eq!(fill("{{args}} }}").unwrap(), "{args} }");
    }

    #[test]
    fn mistakes_in_a_template_are_reported() {
        assert_eq!(Template::parse("a {b"), Err(TemplateError::Open));
        assert_eq!(Template::parse("a } b"), Err(TemplateError::Close));
        let unknown = Template::parse("{text}").unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "has the unknown placeholder {text}; the valid ones are {command}, {args} and {user}"
        );
    }
}
