//! Globs over event types: `*` matches any run of characters, dots included, and `?` any one character.

/// A glob that must match the whole type: `message.*`, `*.new`, `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

/// Why a pattern is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("an empty pattern matches no event; write \"*\" for every event")]
    Empty,
    #[error(
        "{0:?} has no meaning in a pattern: only * and ? are special, so write each alternative as a separate pattern"
    )]
    Unsupported(char),
}

impl Pattern {
    pub fn parse(text: &str) -> Result<Pattern, PatternError> {
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        match text.chars().find(|c| "{}[]!|".contains(*c)) {
            Some(c) => Err(PatternError::Unsupported(c)),
            None => Ok(Pattern(text.to_owned())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it matches every type.
    pub fn is_everything(&self) -> bool {
        self.0.bytes().all(|byte| byte == b'*')
    }

    /// Linear in the length of the type for each `*`: after a mismatch only the last `*` is extended.
    pub fn matches(&self, event_type: &str) -> bool {
        let (pattern, text) = (self.0.as_bytes(), event_type.as_bytes());
        let (mut p, mut t) = (0, 0);
        let mut widen: Option<(usize, usize)> = None;
        while t < text.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    widen = Some((p + 1, t));
                    p += 1;
                }
                Some(b'?') => {
                    p += 1;
                    t += 1;
                    // `?` is one character, not one byte: skip its continuation bytes.
                    while t < text.len() && !event_type.is_char_boundary(t) {
                        t += 1;
                    }
                }
                Some(literal) if *literal == text[t] => {
                    p += 1;
                    t += 1;
                }
                _ => match widen {
                    Some((after, from)) => {
                        p = after;
                        t = from + 1;
                        widen = Some((after, t));
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|byte| *byte == b'*')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_globs() {
        let cases = [
            ("*", "message.new", true),
            ("*", "", true),
            ("message.*", "message.new", true),
            ("message.*", "message.new.more", true),
            ("message.*", "message", false),
            ("message.*", "messages.new", false),
            ("*.new", "reaction.new", true),
            ("*.new", "reaction.newer", false),
            ("reaction.new", "reaction.new", true),
            ("reaction.new", "reaction.new ", false),
            ("r*n.*w", "reaction.new", true),
            ("*a*b", "aabab", true),
            ("*a*b", "aaba", false),
            ("user.?", "user.é", true),
            ("user.?", "user.", false),
            ("", "x", false),
        ];
        for (pattern, text, expected) in cases {
            assert_eq!(Pattern(pattern.to_owned()).matches(text), expected, "{pattern} on {text}");
        }
    }

    #[test]
    fn invalid_patterns_are_refused() {
        assert_eq!(Pattern::parse(""), Err(PatternError::Empty));
        assert_eq!(Pattern::parse("message.{new,updated}"), Err(PatternError::Unsupported('{')));
    }
}
