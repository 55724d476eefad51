//! How a text reads, beside how it is written: chat users write around rules with characters that nobody sees, with marks, and with
//! letters of other alphabets. A pattern is tried on the text and on each of these views; what it matches is found again in the text.
//!
//! ASCII is never folded (`m` looks like `rn`, `0` like `O`), nor is a word of one alphabet: honest Russian or Greek is no Latin word.

use regex::Regex;
use std::ops::Range;
use std::sync::LazyLock;
use unicode_normalization::{UnicodeNormalization, char::canonical_combining_class};
use unicode_script::{Script, UnicodeScript};
use unicode_security::{MixedScript, confusable_detection::skeleton};

/// Characters that are not drawn: zero-width ones, the soft hyphen, controls of direction, variation selectors.
static IGNORABLE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"[\p{Default_Ignorable_Code_Point}&&[^\x00-\x7f]]+").ok());
/// Runs of what markdown emphasises with.
static EMPHASIS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\*{1,3}|_{1,3}|~~|`{1,2}").ok());

static TAG: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("<[^<>]*>").ok());

/// A text as it reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) text: String,
    /// Where each character begins here, and what of the original it stands for.
    places: Vec<(usize, Range<usize>)>,
}

impl View {
    fn of(units: &[Unit]) -> View {
        let (mut text, mut places) = (String::new(), Vec::with_capacity(units.len()));
        for unit in units {
            places.push((text.len(), unit.from.clone()));
            text.push(unit.character);
        }
        View { text, places }
    }

    /// What of the original the characters of this range stand for.
    pub(super) fn original(&self, range: Range<usize>) -> Range<usize> {
        let first = self.places.partition_point(|(at, _)| *at < range.start);
        let end = self.places.partition_point(|(at, _)| *at < range.end);
        let covered = self.places.get(first..end).unwrap_or_default();
        let start = covered.iter().map(|(_, from)| from.start).min();
        start.map_or(0..0, |start| start..covered.iter().map(|(_, from)| from.end).max().unwrap_or(start))
    }
}

/// A character, and the bytes of the original that it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unit {
    character: char,
    from: Range<usize>,
}

/// The ways in which a text reads otherwise than it is written: at most two. `is_markup`: tags are not read.
pub(super) fn views(text: &str, is_markup: bool) -> Vec<View> {
    let is_plain =
        |byte: u8| byte.is_ascii() && !matches!(byte, b'*' | b'_' | b'~' | b'`') && (byte != b'<' || !is_markup);
    if text.bytes().all(is_plain) {
        return Vec::new();
    }
    let drawn = drawn(text, is_markup);
    let plain = View::of(&unmarked(&normalized(&drawn)));
    // A mark that was written apart from its letter, though one character is both, is drawn over it all the same.
    let folded = View::of(&folded(&normalized(&unmarked(&drawn))));
    let mut views = Vec::new();
    for view in [plain, folded] {
        if view.text != text && views.iter().all(|known: &View| known.text != view.text) {
            views.push(view);
        }
    }
    views
}

/// The characters that are drawn, without those of emphasis.
fn drawn(text: &str, is_markup: bool) -> Vec<Unit> {
    let mut hidden: Vec<Range<usize>> = emphasis(text);
    for never_drawn in [Some(&IGNORABLE), is_markup.then_some(&TAG)].into_iter().flatten() {
        if let Some(pattern) = &**never_drawn {
            hidden.extend(pattern.find_iter(text).map(|found| found.range()));
        }
    }
    hidden.sort_by_key(|range| range.start);
    let mut hidden = hidden.into_iter().peekable();
    let mut drawn = Vec::new();
    for (at, character) in text.char_indices() {
        while hidden.next_if(|range| range.end <= at).is_some() {}
        if hidden.peek().is_none_or(|range| !range.contains(&at)) {
            drawn.push(Unit { character, from: at..at + character.len_utf8() });
        }
    }
    drawn
}

/// The marks of emphasis: runs of the same, two by two within a line. An underscore within a word is none.
fn emphasis(text: &str) -> Vec<Range<usize>> {
    let Some(marks) = &*EMPHASIS else { return Vec::new() };
    let is_within_a_word = |range: &Range<usize>| {
        let before = text[..range.start].chars().next_back();
        let after = text[range.end..].chars().next();
        before.is_some_and(char::is_alphanumeric) && after.is_some_and(char::is_alphanumeric)
    };
    let mut found = Vec::new();
    let mut line_start = 0;
    for line in text.split_inclusive('\n') {
        let mut open: Vec<Range<usize>> = Vec::new();
        for mark in marks.find_iter(line) {
            let range = line_start + mark.start()..line_start + mark.end();
            if mark.as_str().starts_with('_') && is_within_a_word(&range) {
                continue;
            }
            match open.iter().position(|other| text[other.clone()] == *mark.as_str()) {
                Some(place) => found.extend([open.remove(place), range]),
                None => open.push(range),
            }
        }
        line_start += line.len();
    }
    found
}

/// NFKC, letter by letter with what is combined with it.
fn normalized(units: &[Unit]) -> Vec<Unit> {
    let mut normalized = Vec::with_capacity(units.len());
    let mut rest = units;
    while let Some((first, others)) = rest.split_first() {
        let combined = others.iter().take_while(|unit| is_combined(unit.character)).count();
        let (letter, after) = rest.split_at(1 + combined);
        rest = after;
        if combined == 0 && first.character.is_ascii() {
            normalized.push(first.clone());
            continue;
        }
        let from = first.from.start..letter.last().map_or(first.from.end, |last| last.from.end);
        let characters = letter.iter().map(|unit| unit.character).nfkc();
        normalized.extend(characters.map(|character| Unit { character, from: from.clone() }));
    }
    normalized
}

/// Marks, and the vowels and finals of Korean syllables.
fn is_combined(character: char) -> bool {
    canonical_combining_class(character) != 0 || matches!(character, '\u{1160}'..='\u{11ff}')
}

/// Without marks that any letter can get; those that belong to one script, as vowels of Hindi or Hebrew do, stay.
fn unmarked(units: &[Unit]) -> Vec<Unit> {
    let is_mark = |unit: &&Unit| {
        let character = unit.character;
        canonical_combining_class(character) != 0 && character.script() == Script::Inherited
    };
    units.iter().filter(|unit| !is_mark(unit)).cloned().collect()
}

/// With letters that look like ASCII's made those, in words that mix scripts.
fn folded(units: &[Unit]) -> Vec<Unit> {
    let mut folded = units.to_vec();
    for word in folded.chunk_by_mut(|one, next| one.character.is_alphanumeric() && next.character.is_alphanumeric()) {
        let letters: String = word.iter().map(|unit| unit.character).collect();
        if letters.is_ascii() || letters.as_str().is_single_script() {
            continue;
        }
        for unit in word {
            unit.character = ascii_of(unit.character).unwrap_or(unit.character);
        }
    }
    folded
}

/// The ASCII letter or digit that a character looks like, in its own case or in the other.
fn ascii_of(character: char) -> Option<char> {
    if character.is_ascii() {
        return None;
    }
    let lower = single(character.to_lowercase());
    let upper = single(character.to_uppercase());
    if character.is_uppercase() {
        // First the lower case: a capital I looks like an l, but its lower case is an i.
        lower.and_then(look_alike).map(|found| found.to_ascii_uppercase()).or_else(|| look_alike(character))
    } else {
        look_alike(character).or_else(|| upper.and_then(look_alike).map(|found| found.to_ascii_lowercase()))
    }
}

fn look_alike(character: char) -> Option<char> {
    let mut bytes = [0; 4];
    let prototype: String = skeleton(character.encode_utf8(&mut bytes)).collect();
    match &*prototype {
        // What an ASCII m is made of, too.
        "rn" => Some('m'),
        _ => single(prototype.chars()).filter(char::is_ascii_alphanumeric),
    }
}

fn single(mut characters: impl Iterator<Item = char>) -> Option<char> {
    let first = characters.next();
    first.filter(|_| characters.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Whether some way to read the text matches.
    fn reads(pattern: &str, text: &str) -> bool {
        let pattern = Regex::new(pattern).unwrap();
        pattern.is_match(text) || views(text, false).iter().any(|view| pattern.is_match(&view.text))
    }

    #[test]
    fn the_patterns_are_valid() {
        assert!(IGNORABLE.is_some() && EMPHASIS.is_some() && TAG.is_some());
    }

    #[test]
    fn a_word_is_read_however_it_is_written() {
        for text in [
            "casino",
            "CASINO",
            "ca\u{200b}si\u{200d}no",
            "c\u{ad}asino",
            "cas\u{2060}ino\u{feff}",
            "ca\u{fe0f}sino",
            "\u{202e}casino\u{202c}",
            "ｃａｓｉｎｏ",
            "𝐜𝐚𝐬𝐢𝐧𝐨",
            "ⓒⓐⓢⓘⓝⓞ",
            "c\u{336}a\u{336}s\u{336}i\u{336}n\u{336}o\u{336}",
            "c\u{301}asi\u{301}no",
            "c\u{20d2}asino",
            "ca\u{34f}sino",
            "ca**si**no",
            "*casino*",
            "_casino_",
            "__casino__",
            "***casino***",
            "~~casino~~ free",
            "ca*s*ino",
            "`casino`",
            "саsinо",
            "cаsіno",
            "СASINO",
            "cαsino",
            "casiпo casiոo",
            "CАSІNО",
        ] {
            assert!(reads(r"(?i)\bcasino\b", text), "{text}: {:?}", views(text, false));
        }
    }

    #[test]
    fn honest_sentences_of_other_languages_match_no_latin_word() {
        let sentences = [
            "Мы сегодня весь вечер сидим в кафе на площади",
            "Росія та Україна, кава і чай, хата й сад",
            "Το καφέ είναι ανοιχτό, έλα να πιούμε ένα ποτό",
            "Ние сме в София, а вие къде сте",
            "Ես սիրում եմ քեզ, բարև Հայաստան",
            "هذا المقهى مفتوح كل يوم",
            "בית הקפה הזה פתוח כל יום",
            "यह कैफे हर दिन खुला रहता है",
            "這家咖啡館每天都開門",
            "このカフェは毎日開いています",
            "이 카페는 매일 문을 엽니다",
            "ร้านกาแฟนี้เปิดทุกวัน",
            "El niño cumplió un año; mañana iremos al café",
            "Ça va être très bien, à bientôt",
            "Das Mädchen ist schön, für heute genug",
            "İstanbul'da güneşli bir gün, çok güzel",
            "Tôi thích uống cà phê sữa đá mỗi sáng",
            "Zażółć gęślą jaźń, dziękuję",
        ];
        let words = r"(?i)\b(?:cafe|cac|coc|poc|pop|hate|sad|ano|nino|schon|tres|etre|ca|oh|no|ok|cook|hop|top|kapa|caca|cap|car|bee)\b";
        for sentence in sentences {
            assert!(!reads(words, sentence), "{sentence}: {:?}", views(sentence, false));
            // Without a Latin letter there is nothing to fold: no view has one.
            let is_latin = |text: &str| text.bytes().any(|byte| byte.is_ascii_alphabetic());
            assert!(
                is_latin(sentence) || views(sentence, false).iter().all(|view| !is_latin(&view.text)),
                "{sentence}"
            );
        }
        for honest in ["snake_case_name", "2*3=6", "a ** b", "5 * 4 _ 3", "m0dern rn"] {
            assert_eq!(views(honest, false), [], "{honest}");
        }
    }

    #[test]
    fn what_matches_is_found_again() {
        let pattern = Regex::new("casino").unwrap();
        for (text, expected) in [
            ("x ca**si**no y", "ca**si**no"),
            ("x c\u{336}a\u{336}sino\u{336} y", "c\u{336}a\u{336}sino\u{336}"),
            ("é ｃａｓｉｎｏ é", "ｃａｓｉｎｏ"),
            ("саsinо", "саsinо"),
            ("ﬁ casi\u{200b}no", "casi\u{200b}no"),
        ] {
            let found =
                views(text, false).iter().find_map(|view| Some(view.original(pattern.find(&view.text)?.range())));
            assert_eq!(&text[found.unwrap()], expected);
        }
    }

    proptest! {
        /// Every range of a view stands for a part of the text, whose ends are characters' ends.
        #[test]
        fn every_place_is_one_of_the_text(text in "[a-c*_~`\u{200b}\u{301}\u{336}а-вﬁ한\u{1161}é\u{1f600}\n ]{0,40}", any in any::<String>()) {
            for text in [text, any] {
                for view in views(&text, false) {
                    for (at, character) in view.text.char_indices() {
                        let range = view.original(at..at + character.len_utf8());
                        prop_assert!(text.get(range.clone()).is_some_and(|part| !part.is_empty()), "{range:?} of {text:?}");
                    }
                    prop_assert_eq!(view.original(0..0), 0..0);
                }
            }
        }
    }
}
