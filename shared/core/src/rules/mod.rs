//! Rules for before-message-send that need no code: limits, and patterns over what a chat user wrote.
//!
//! Matching is linear in the length of the text, so that no sender can make a pattern expensive.

mod links;
mod views;
mod written;

pub use written::Part;

use crate::peek::field;
use regex::Regex;
use serde_json::value::RawValue;
use std::ops::Range;
use views::{TooLong, View};
use written::{Form, Written};

/// The action of a pattern that matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The message is not stored; its sender sees the rule's text.
    Reject,
    /// The rule's text replaces each match; where Stream accepts no change, the message is not stored.
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

/// Applied in this order: limits, rules that reject, rules that mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Most characters of the text.
    pub max_length: Option<usize>,
    /// Most links in the text, the attachments and the poll.
    pub max_links: Option<usize>,
    pub rules: Vec<Rule>,
    /// The parts that patterns are matched against. Default: all.
    pub parts: Vec<Part>,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules { max_length: None, max_links: None, rules: Vec::new(), parts: Part::ALL.to_vec() }
    }
}

/// The rules' decision about a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    Pass,
    Reject(String),
    /// The message's JSON after masking.
    Mask(String),
    /// Not JSON, or too long: nothing was judged.
    Unreadable,
}

/// What the sender sees if the message cannot be masked.
const NOT_ALLOWED: &str = "This message is not allowed here.";

impl Rules {
    pub fn is_empty(&self) -> bool {
        self.max_length.is_none() && self.max_links.is_none() && self.rules.is_empty()
    }

    /// Whether any rule changes messages.
    pub fn masks(&self) -> bool {
        self.rules.iter().any(|rule| matches!(rule.action, Action::Mask))
    }

    /// Judges the message in a hook's signed body.
    pub fn judge(&self, body: &[u8]) -> Judgement {
        // Invalid UTF-8 becomes U+FFFD, as Stream's clients would show it.
        let body = String::from_utf8_lossy(body);
        if serde_json::from_str::<&RawValue>(&body).is_err() {
            return Judgement::Unreadable;
        }
        let message = field(body.as_bytes(), "message").map(RawValue::get);
        match message {
            Some(message) if message.starts_with('{') => self.judge_message(message),
            None | Some("null") => Judgement::Pass,
            Some(_) => Judgement::Unreadable,
        }
    }

    fn judge_message(&self, message: &str) -> Judgement {
        let Ok(written) = written::written(message, &Part::ALL) else { return Judgement::Unreadable };
        let Ok(texts) = written.into_iter().map(Readings::of).collect::<Result<Vec<_>, _>>() else {
            return Judgement::Unreadable;
        };
        if let Some(rejection) = self.over_a_limit(&texts) {
            return Judgement::Reject(rejection);
        }
        let within = |one: &&Readings<'_>| self.parts.contains(&one.written.part) && one.written.is_read();
        let texts: Vec<_> = texts.iter().filter(within).collect();
        let rejects =
            |rule: &&Rule| rule.action == Action::Reject && texts.iter().any(|text| text.matches(&rule.pattern));
        if let Some(rule) = self.rules.iter().find(rejects) {
            return Judgement::Reject(rule.text.clone());
        }
        let mut masked = String::with_capacity(message.len());
        let mut copied = 0;
        for text in texts {
            let Some(changed) = self.masked(text) else { continue };
            if !text.written.is_changeable {
                return Judgement::Reject(NOT_ALLOWED.to_owned());
            }
            let Range { start, end } = text.written.literal;
            masked.push_str(&message[copied..start]);
            masked.push_str(&serde_json::Value::from(changed).to_string());
            copied = end;
        }
        if copied == 0 {
            return Judgement::Pass;
        }
        masked.push_str(&message[copied..]);
        // The remaining text may match as well, or the masks may turn it into emphasis.
        match self.matches_none(&masked) {
            true => Judgement::Mask(masked),
            false => Judgement::Reject(NOT_ALLOWED.to_owned()),
        }
    }

    /// Whether no rule objects to this message.
    fn matches_none(&self, message: &str) -> bool {
        let Ok(written) = written::written(message, &self.parts) else { return false };
        let written = written.into_iter().filter(Written::is_read);
        written.map(Readings::of).all(|text| match text {
            Ok(text) => self.rules.iter().all(|rule| match rule.action {
                Action::Reject => !text.matches(&rule.pattern),
                Action::Mask => text.found(&rule.pattern).is_empty(),
            }),
            Err(_) => false,
        })
    }

    fn over_a_limit(&self, texts: &[Readings<'_>]) -> Option<String> {
        if let Some(most) = self.max_length {
            let is_long =
                |one: &Readings<'_>| one.written.form == Form::Text && one.written.text.chars().count() > most;
            if texts.iter().any(is_long) {
                return Some(format!("This message is too long: at most {most} characters."));
            }
        }
        let most = self.max_links.filter(|most| links_of(texts) > *most)?;
        Some(match most {
            0 => "Links are not allowed here.".to_owned(),
            most => format!("This message has too many links: at most {most}."),
        })
    }

    /// The text after masking, if any rule matches.
    fn masked(&self, text: &Readings<'_>) -> Option<String> {
        let masks = self.rules.iter().filter(|rule| rule.action == Action::Mask);
        let mut found: Vec<(Range<usize>, &str)> =
            masks.flat_map(|rule| text.found(&rule.pattern).into_iter().map(|range| (range, &*rule.text))).collect();
        if found.is_empty() {
            return None;
        }
        // Of two matches with the same start, the longer one comes first.
        found.sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        let (mut masked, mut copied, original) = (String::new(), 0, &*text.written.text);
        for (Range { start, end }, mask) in found {
            if start < copied {
                // A match that overlaps an earlier one is covered by that one's mask.
                copied = copied.max(end);
                continue;
            }
            masked.push_str(&original[copied..start]);
            masked.push_str(mask);
            copied = end;
        }
        masked.push_str(&original[copied..]);
        Some(masked)
    }
}

/// The number of links that a reader sees: those of the text, or of the translation or markup that has more; of the poll; and
/// the targets of attachments. An attachment that Stream made from an address in the text leads there once more, often by
/// another address.
fn links_of(texts: &[Readings<'_>]) -> usize {
    let is_text = |one: &&Readings<'_>| {
        let Written { form, part, .. } = one.written;
        matches!(form, Form::Text | Form::Markup) || part == Part::I18n
    };
    let text = texts.iter().filter(is_text).map(Readings::links).max_by_key(Vec::len).unwrap_or_default();
    let of = |wanted: Form| texts.iter().filter(move |one| one.written.form == wanted).flat_map(Readings::links);
    let is_new = |link: &String| !text.contains(link);
    let previews = of(Form::Preview).filter(|link| text.contains(link)).count();
    let mut targets: Vec<_> = of(Form::Target).filter(is_new).collect();
    targets.sort();
    targets.dedup();
    let polls = texts.iter().filter(|one| one.written.part == Part::Poll).flat_map(Readings::links).filter(is_new);
    text.len() + targets.len().saturating_sub(previews) + polls.count()
}

/// A string with its alternative readings.
struct Readings<'m> {
    written: Written<'m>,
    views: Vec<View>,
}

impl<'m> Readings<'m> {
    fn of(written: Written<'m>) -> Result<Readings<'m>, TooLong> {
        let views = views::views(&written.text, written.form == Form::Markup)?;
        Ok(Readings { written, views })
    }

    fn matches(&self, pattern: &Regex) -> bool {
        pattern.is_match(&self.written.text) || self.views.iter().any(|view| pattern.is_match(&view.text))
    }

    /// The parts of the string that the pattern matches in any reading. Empty matches do not count.
    fn found(&self, pattern: &Regex) -> Vec<Range<usize>> {
        let as_written = pattern.find_iter(&self.written.text).map(|found| found.range());
        let as_read = self.views.iter().flat_map(|view| {
            pattern.find_iter(&view.text).filter(|found| !found.is_empty()).map(|found| view.original(found.range()))
        });
        as_written.chain(as_read).filter(|range| !range.is_empty()).collect()
    }

    /// The links of the reading that has the most.
    fn links(&self) -> Vec<String> {
        let as_read = self.views.iter().map(|view| links::links(&view.text));
        let all = as_read.chain([links::links(&self.written.text)]);
        all.max_by_key(Vec::len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(pattern: &str, action: Action, text: &str) -> Rule {
        Rule { pattern: Regex::new(pattern).unwrap(), action, text: text.to_owned() }
    }

    fn reject(text: &str) -> Judgement {
        Judgement::Reject(text.to_owned())
    }

    fn judge(rules: &Rules, message: &str) -> Judgement {
        rules.judge(format!("{{\"message\":{message}}}").as_bytes())
    }

    #[test]
    fn a_table_of_texts() {
        let rules = Rules {
            max_length: Some(40),
            max_links: Some(1),
            rules: vec![
                rule(r"\d{4}", Action::Mask, "$0****"),
                rule("(?i)spam", Action::Reject, "No spam."),
                rule("x", Action::Mask, "y"),
                rule("z*", Action::Mask, "Z"),
            ],
            ..Rules::default()
        };
        let masked = |text: &str| Judgement::Mask(format!("{{\"text\":\"{text}\"}}"));
        let cases = [
            ("hello", Judgement::Pass),
            ("", Judgement::Pass),
            ("card 1234 5678 x", masked("card $0**** $0**** y")),
            ("1234 and SPAM", reject("No spam.")),
            ("s**pa**m", reject("No spam.")),
            ("12\u{200b}34!", masked("$0****!")),
            ("zz top", masked("Z top")),
            ("é".repeat(40).leak(), Judgement::Pass),
            ("é".repeat(41).leak(), reject("This message is too long: at most 40 characters.")),
            ("see http://a.b", Judgement::Pass),
            ("HTTP://a,https://b", reject("This message has too many links: at most 1.")),
            ("(www.a.b) www.c.d", reject("This message has too many links: at most 1.")),
            ("ｅｖｉｌ．ｃｏｍ good.com", reject("This message has too many links: at most 1.")),
            ("awww.so sweet", Judgement::Pass),
        ];
        for (text, expected) in cases {
            assert_eq!(judge(&rules, &format!("{{\"text\":\"{text}\"}}")), expected, "{text}");
        }
        assert!(rules.masks() && !rules.is_empty() && Rules::default().is_empty());
        let none = Rules { max_links: Some(0), ..Rules::default() };
        assert_eq!(judge(&none, r#"{"text":"[win](evil.com)"}"#), reject("Links are not allowed here."));
    }

    #[test]
    fn links_of_attachments_count_and_uploads_do_not() {
        let rules = Rules { max_links: Some(1), ..Rules::default() };
        let over = reject("This message has too many links: at most 1.");
        let attached = |text: &str, attachment: &str| {
            judge(&rules, &format!(r#"{{"text":"{text}","attachments":[{attachment}]}}"#))
        };
        assert_eq!(attached("http://a.com", r#"{"title_link":"https://a.com/"}"#), Judgement::Pass);
        assert_eq!(attached("http://a.com", r#"{"title_link":"https://b.com/"}"#), over);
        assert_eq!(attached("", r#"{"title_link":"https://b.com/"},{"author_link":"c.com"}"#), over);
        let preview = r#"{"og_scrape_url":"https://youtu.be/x","title_link":"https://www.youtube.com/watch?v=x","text":"see a.com, b.com"}"#;
        assert_eq!(attached("https://youtu.be/x", preview), Judgement::Pass);
        assert_eq!(attached("https://a.com/", preview), over);
        assert_eq!(
            attached("", r#"{"title":"main.rs lib.rs"},{"giphy":{"original":{"url":"http://a.com http://b.com"}}}"#),
            Judgement::Pass
        );
        let translated = judge(&rules, r#"{"text":"x","i18n":{"en_text":"a.com b.com","language":"en"}}"#);
        assert_eq!(translated, over);
        let uploads =
            r#"{"image_url":"https://a.com/1"},{"asset_url":"https://b.com/2"},{"thumb_url":"https://c.com/3"}"#;
        assert_eq!(attached("http://a.com", uploads), Judgement::Pass);
    }

    #[test]
    fn every_part_is_judged_and_masked_where_stream_takes_it() {
        let rejects = Rules { rules: vec![rule("casino", Action::Reject, "No.")], ..Rules::default() };
        let masks = Rules { rules: vec![rule("casino", Action::Mask, "***")], ..Rules::default() };
        for (message, masked) in [
            (r#"{"n":1.10,"text":"my casino","big":12345678901234567890}"#, true),
            (r#"{"text":"","i18n":{"en_text":"casino","language":"en"}}"#, true),
            (r#"{"attachments":[{"title":"casino","image_url":"http://casino.com"}]}"#, true),
            (r#"{"attachments":[{"title_link":"https://casino.com"}]}"#, true),
            (r#"{"mood":{"deep":["casino",1.10]}}"#, true),
            (r#"{"text":"x","html":"<p>casino</p>"}"#, false),
            (r#"{"mml":"<mml>casino</mml>"}"#, false),
            (r#"{"mml":"<b>ca</b>sin<i/>o"}"#, false),
            (r#"{"args":"casino"}"#, false),
            (r#"{"poll":{"options":[{"text":"casino"}]}}"#, false),
            (r#"{"quoted_message":{"text":"casino"}}"#, false),
        ] {
            assert_eq!(judge(&rejects, message), reject("No."), "{message}");
            let expected = match masked {
                true => Judgement::Mask(message.replacen("casino", "***", 1)),
                false => reject(NOT_ALLOWED),
            };
            assert_eq!(judge(&masks, message), expected, "{message}");
            let elsewhere = Rules { parts: Vec::new(), ..rejects.clone() };
            assert_eq!(judge(&elsewhere, message), Judgement::Pass, "{message}");
        }
        for message in
            [r#"{"id":"casino","user":{"name":"casino"}}"#, r#"{"attachments":[{"image_url":"http://casino.com"}]}"#]
        {
            assert_eq!(judge(&rejects, message), Judgement::Pass, "{message}");
        }
    }

    #[test]
    fn masks_never_build_what_they_mask() {
        let masks = |text: &str| Rules { rules: vec![rule("(?i)casino", Action::Mask, text)], ..Rules::default() };
        for (mask, text) in [("***", "cacasinosicasinono"), ("", "cacasinosino"), ("**", "cacasinosino")] {
            let judged = judge(&masks(mask), &format!("{{\"text\":\"{text}\"}}"));
            assert_eq!(judged, reject(NOT_ALLOWED), "{mask:?}");
        }
        let judged = judge(&masks("***"), r#"{"text":"a casino, b"}"#);
        assert_eq!(judged, Judgement::Mask(r#"{"text":"a ***, b"}"#.to_owned()));
    }

    #[test]
    fn an_unreadable_body_is_distinguished_from_one_without_text() {
        let rules = Rules { rules: vec![rule("casino", Action::Reject, "No.")], ..Rules::default() };
        for body in [&b"no JSON"[..], b"", b"{", b"{\"message\":7}", b"{\"message\":{\"text\":\"x\"}"] {
            assert_eq!(rules.judge(body), Judgement::Unreadable, "{body:?}");
        }
        for body in [&b"{}"[..], b"[]", b"{\"message\":null}", b"{\"message\":{}}", b"{\"message\":{\"text\":7}}"] {
            assert_eq!(rules.judge(body), Judgement::Pass, "{body:?}");
        }
        for body in [
            &b"{\"message\":{\"text\":\"casino \\ud83d\"}}"[..],
            b"{\"message\":{\"text\":\"casino \xff\"}}",
            b"{\"\\ud83d\":1,\"message\":{\"\\ud83d\":1,\"text\":\"casino\"}}",
        ] {
            assert_eq!(rules.judge(body), reject("No."), "{body:?}");
        }
        let masks = Rules { rules: vec![rule("casino", Action::Mask, "***")], ..Rules::default() };
        let masked = masks.judge(b"{\"message\":{\"text\":\"casino \xff\",\"a\":\"\\ud83d\"}}");
        assert_eq!(masked, Judgement::Mask("{\"text\":\"*** \u{fffd}\",\"a\":\"\\ud83d\"}".to_owned()));
    }

    proptest! {
        /// However a user writes, what is masked is gone, and the rest stays.
        #[test]
        fn a_masked_message_holds_no_match(text in "(a|b|casino|ca\u{200b}sino|ca\\*s\\*ino| |é|\u{301}){0,12}") {
            let masks = Rules { rules: vec![rule("casino", Action::Mask, "-")], ..Rules::default() };
            let message = serde_json::json!({"text": text, "n": 1}).to_string();
            let judged = judge(&masks, &message);
            if judged == reject(NOT_ALLOWED) {
                return Ok(());
            }
            if let Judgement::Mask(masked) = judged {
                let masked: serde_json::Value = serde_json::from_str(&masked).unwrap();
                prop_assert!(!masked["text"].as_str().unwrap().contains("casino"));
            prop_assert_eq!(masks.judge(format!("{{\"message\":{masked}}}").as_bytes()), Judgement::Pass);
                prop_assert_eq!(&masked["n"], 1);
            } else {
                prop_assert_eq!(judged, Judgement::Pass);
            }
        }

        /// However deep and however escaped: a message is rejected if any string that others read matches.
        #[test]
        fn a_word_is_found_wherever_it_stands(
            keys in proptest::collection::vec("[a-f]{1,3}", 1..8),
            lists in proptest::collection::vec(any::<bool>(), 8),
            escapes in proptest::collection::vec(any::<bool>(), 6),
            has in any::<bool>(),
        ) {
            let rejects = Rules { rules: vec![rule("casino", Action::Reject, "No.")], ..Rules::default() };
            let word = if has { "casino" } else { "carina" };
            let escaped: String = word.chars().zip(escapes).map(|(letter, is_escaped)| match is_escaped {
                true => format!("\\u{:04X}", u32::from(letter)),
                false => letter.to_string(),
            }).collect();
            let nested = keys.iter().zip(lists).fold(format!("\"{escaped}\""), |inner, (key, is_list)| match is_list {
                true => format!("[1.0, \"{key}\", {inner}]"),
                false => format!("{{ \"{key}\" : {inner}, \"{key}\":null }}"),
            });
            let expected = if has { reject("No.") } else { Judgement::Pass };
            prop_assert_eq!(judge(&rejects, &format!("{{\"x\":0,\"f{}\":{nested}}}", keys[0])), expected);
        }

        #[test]
        fn nothing_panics(body in proptest::collection::vec(any::<u8>(), 0..200), text in any::<String>()) {
            let rules = Rules {
                max_length: Some(5),
                max_links: Some(0),
                rules: vec![rule(".", Action::Mask, "-"), rule("casino", Action::Reject, "No.")],
                ..Rules::default()
            };
            rules.judge(&body);
            let body = serde_json::json!({"message": {"attachments": [{"title": text}]}}).to_string();
            rules.judge(body.as_bytes());
        }
    }
}
