//! Rules for before-message-send that need no code: limits and patterns over the message's text.
//!
//! Patterns run in linear time, whatever the text: a sender cannot make one expensive.

use regex::{NoExpand, Regex};
use std::borrow::Cow;

/// What a pattern that matches does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The message is not stored; its sender reads the rule's text.
    Reject,
    /// Whatever the pattern matches is replaced by the rule's text.
    Mask,
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub pattern: Regex,
    pub action: Action,
    pub text: String,
}

impl PartialEq for Rule {
    fn eq(&self, other: &Rule) -> bool {
        (self.pattern.as_str(), self.action, &self.text) == (other.pattern.as_str(), other.action, &other.text)
    }
}

impl Eq for Rule {}

/// Limits first, then the rules that reject, then all that mask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Most characters of the text.
    pub max_length: Option<usize>,
    /// Most links in the text.
    pub max_links: Option<usize>,
    pub rules: Vec<Rule>,
}

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    Pass,
    Reject(String),
    /// The text with what was masked.
    Mask(String),
}

impl Rules {
    pub fn is_empty(&self) -> bool {
        self.max_length.is_none() && self.max_links.is_none() && self.rules.is_empty()
    }

    /// Whether some rule changes messages.
    pub fn masks(&self) -> bool {
        self.rules.iter().any(|rule| matches!(rule.action, Action::Mask))
    }

    pub fn judge(&self, text: &str) -> Judgement {
        if let Some(most) = self.max_length.filter(|most| text.chars().count() > *most) {
            return Judgement::Reject(format!("This message is too long: at most {most} characters."));
        }
        if let Some(most) = self.max_links.filter(|most| links(text) > *most) {
            return Judgement::Reject(match most {
                0 => "Links are not allowed here.".to_owned(),
                most => format!("This message has too many links: at most {most}."),
            });
        }
        let mut masked = Cow::from(text);
        for rule in &self.rules {
            match rule.action {
                Action::Reject if rule.pattern.is_match(text) => return Judgement::Reject(rule.text.clone()),
                Action::Reject => {}
                Action::Mask => {
                    if let Cow::Owned(changed) = rule.pattern.replace_all(&masked, NoExpand(&rule.text)) {
                        masked = Cow::Owned(changed);
                    }
                }
            }
        }
        match masked {
            Cow::Borrowed(_) => Judgement::Pass,
            Cow::Owned(masked) => Judgement::Mask(masked),
        }
    }
}

/// What chat clients make a link of: addresses with a scheme of the web, and words that begin with `www.`.
fn links(text: &str) -> usize {
    let text = text.to_ascii_lowercase();
    let schemes = text.matches("http://").count() + text.matches("https://").count();
    schemes
        + text
            .split(|c: char| c.is_whitespace() || "([<\"'".contains(c))
            .filter(|word| word.starts_with("www."))
            .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pattern: &str, action: Action, text: &str) -> Rule {
        Rule { pattern: Regex::new(pattern).unwrap(), action, text: text.to_owned() }
    }

    #[test]
    fn a_table_of_messages() {
        let rules = Rules {
            max_length: Some(40),
            max_links: Some(1),
            rules: vec![
                rule(r"\d{4}", Action::Mask, "$0****"),
                rule("(?i)spam", Action::Reject, "No spam."),
                rule("x", Action::Mask, "y"),
            ],
        };
        let reject = |text: &str| Judgement::Reject(text.to_owned());
        let cases = [
            ("hello", Judgement::Pass),
            ("", Judgement::Pass),
            ("card 1234 5678 x", Judgement::Mask("card $0**** $0**** y".into())),
            ("1234 and SPAM", reject("No spam.")),
            ("é".repeat(40).leak(), Judgement::Pass),
            ("é".repeat(41).leak(), reject("This message is too long: at most 40 characters.")),
            ("see http://a.b", Judgement::Pass),
            ("HTTP://a,https://b", reject("This message has too many links: at most 1.")),
            ("(www.a.b) www.c.d", reject("This message has too many links: at most 1.")),
            ("awww.so sweet", Judgement::Pass),
        ];
        for (text, expected) in cases {
            assert_eq!(rules.judge(text), expected, "{text}");
        }
        assert!(rules.masks() && !rules.is_empty() && Rules::default().is_empty());
        let none = Rules { max_links: Some(0), ..Rules::default() };
        assert_eq!(none.judge("http://a"), reject("Links are not allowed here."));
    }
}
