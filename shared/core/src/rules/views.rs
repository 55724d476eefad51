//! Alternative readings of a text: chat users evade rules with invisible characters, with markup, and with letters of other
//! alphabets. A pattern is matched against the text and each of these views; a match in a view is mapped back to the text.
//!
//! ASCII is never folded (`m` looks like `rn`, `0` like `O`), and neither is a word of one alphabet: real Russian or Greek is
//! not a Latin word.

use regex::Regex;
use std::ops::Range;
use std::sync::LazyLock;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::{canonical_combining_class, compose};
use unicode_script::{Script, UnicodeScript};
use unicode_security::{MixedScript, confusable_detection::skeleton};

/// Characters that are not drawn: zero-width ones, the soft hyphen, direction controls, variation selectors, control characters.
static INVISIBLE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"[\p{Default_Ignorable_Code_Point}\p{Cc}\x{fff9}-\x{fffb}&&[^\t\n\r]]+").ok());
/// Runs of markdown's emphasis characters.
static EMPHASIS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[*~`_]+").ok());
/// Invisible parts of a markdown link or picture: the brackets and the address.
static LINK: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"(!?\[)([^\[\]\n]*)(\]\([^()\n]*\))").ok());
/// A backslash before punctuation, which is not shown.
static ESCAPE: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\\[!-/:-@\[-`{-~]").ok());
static TAG: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"</?([A-Za-z][A-Za-z0-9]*)?[^<>]*>").ok());
/// Tags that do not separate words; all others do.
const INLINE: [&str; 18] = [
    "a", "b", "code", "del", "em", "font", "i", "ins", "mark", "s", "small", "span", "strike", "strong", "sub", "sup",
    "u", "wbr",
];
/// How many times longer a view may be than its text: one character can expand to a sentence.
const MOST: usize = 4;

/// One reading of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) text: String,
    /// Where each character begins in `text`, and the part of the original it represents.
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

    /// The part of the original that this range represents.
    pub(super) fn original(&self, range: Range<usize>) -> Range<usize> {
        let first = self.places.partition_point(|(at, _)| *at < range.start);
        let end = self.places.partition_point(|(at, _)| *at < range.end);
        let covered = self.places.get(first..end).unwrap_or_default();
        let start = covered.iter().map(|(_, from)| from.start).min();
        start.map_or(0..0, |start| start..covered.iter().map(|(_, from)| from.end).max().unwrap_or(start))
    }
}

/// A character, and the bytes of the original that it represents.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unit {
    character: char,
    from: Range<usize>,
}

/// The view would be far longer than the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// At most two readings that differ from the text as written. In markup, tags are skipped.
pub(super) fn views(text: &str, is_markup: bool) -> Result<Vec<View>, TooLong> {
    let is_plain = |byte: u8| match byte {
        b'*' | b'_' | b'~' | b'`' | b'[' | b'\\' => false,
        b'<' => !is_markup,
        b'\t' | b'\n' | b'\r' | b' '..=b'}' => true,
        _ => false,
    };
    if text.bytes().all(is_plain) {
        return Ok(Vec::new());
    }
    let plain = unmarked(&normalized(&drawn(text, is_markup), text.len())?);
    let mut views = Vec::new();
    for view in [View::of(&plain), View::of(&folded(&plain))] {
        if view.text != text && views.iter().all(|known: &View| known.text != view.text) {
            views.push(view);
        }
    }
    Ok(views)
}

/// The characters that are drawn, without markup.
fn drawn(text: &str, is_markup: bool) -> Vec<Unit> {
    let mut hidden: Vec<Range<usize>> = Vec::new();
    let mut parting: Vec<Range<usize>> = Vec::new();
    if is_markup && let Some(tag) = &*TAG {
        for found in tag.captures_iter(text) {
            let name = found.get(1).map_or("", |name| name.as_str()).to_ascii_lowercase();
            let whole = found.get(0).map_or(0..0, |whole| whole.range());
            if INLINE.contains(&&*name) { hidden.push(whole) } else { parting.push(whole) }
        }
    }
    if let Some(link) = &*LINK {
        hidden.extend(
            link.captures_iter(text)
                .flat_map(|found| [1, 3].map(|part| found.get(part).map_or(0..0, |part| part.range()))),
        );
    }
    if let Some(escape) = &*ESCAPE {
        hidden.extend(escape.find_iter(text).map(|found| found.start()..found.start() + 1));
    }
    if let Some(invisible) = &*INVISIBLE {
        hidden.extend(invisible.find_iter(text).map(|found| found.range()));
    }
    hidden.extend(emphasis(text));
    hidden.sort_by_key(|range| range.start);
    parting.sort_by_key(|range| range.start);
    let (mut hidden, mut parting) = (Cover::new(hidden), Cover::new(parting));
    let characters = text.char_indices().filter(|(at, _)| !hidden.covers(*at));
    let units = characters.map(|(at, character)| {
        let from = at..at + character.len_utf8();
        Unit { character: if parting.covers(at) { ' ' } else { character }, from }
    });
    units.collect()
}

/// Sorted ranges, queried at ascending positions.
struct Cover {
    ranges: std::iter::Peekable<std::vec::IntoIter<Range<usize>>>,
    end: usize,
}

impl Cover {
    fn new(ranges: Vec<Range<usize>>) -> Cover {
        Cover { ranges: ranges.into_iter().peekable(), end: 0 }
    }

    fn covers(&mut self, at: usize) -> bool {
        while let Some(range) = self.ranges.next_if(|range| range.start <= at) {
            self.end = self.end.max(range.end);
        }
        at < self.end
    }
}

/// Emphasis marks. Which of them markdown pairs depends on its dialect, so all that touch a letter are left out, but not the
/// asterisk in `2*3` and not the underscore in `snake_case`.
fn emphasis(text: &str) -> Vec<Range<usize>> {
    let Some(marks) = &*EMPHASIS else { return Vec::new() };
    let is_emphasis = |range: &Range<usize>| {
        let before = text[..range.start].chars().next_back();
        let after = text[range.end..].chars().next();
        let [before, after] = [before, after].map(|near| near.filter(|near| near.is_alphanumeric()));
        let mark = &text[range.clone()];
        let is_within = before.is_some() && after.is_some();
        let are_digits = [before, after].into_iter().flatten().all(|near| near.is_numeric());
        match () {
            () if mark.bytes().all(|byte| byte == b'_') => !is_within,
            () if mark.len() == 1 => !(is_within && are_digits),
            () => true,
        }
    };
    marks.find_iter(text).map(|found| found.range()).filter(is_emphasis).collect()
}

/// Applies NFKC to each letter together with its combining characters.
fn normalized(units: &[Unit], bytes: usize) -> Result<Vec<Unit>, TooLong> {
    let mut normalized = Vec::with_capacity(units.len());
    let mut rest = units;
    while let Some((first, others)) = rest.split_first() {
        if normalized.len() > bytes.saturating_mul(MOST) {
            return Err(TooLong);
        }
        let mut last = first.character;
        let joins = |unit: &&Unit| {
            let joins = is_combined(unit.character) || compose(last, unit.character).is_some();
            last = unit.character;
            joins
        };
        let combined = others.iter().take_while(joins).count();
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
    Ok(normalized)
}

/// Marks over or around a letter, and the vowels and finals of Korean syllables.
fn is_combined(character: char) -> bool {
    canonical_combining_class(character) != 0 || is_enclosing(character) || matches!(character, '\u{1160}'..='\u{11ff}')
}

/// The general category Me.
fn is_enclosing(character: char) -> bool {
    matches!(character, '\u{488}' | '\u{489}' | '\u{1abe}' | '\u{20dd}'..='\u{20e0}' | '\u{20e2}'..='\u{20e4}' | '\u{a670}'..='\u{a672}')
}

/// Removes marks that did not compose with a letter, except those of the letter's own script, such as vowels in Hindi or Hebrew.
fn unmarked(units: &[Unit]) -> Vec<Unit> {
    let mut unmarked: Vec<Unit> = Vec::with_capacity(units.len());
    for unit in units {
        let script = unit.character.script();
        let is_own = |letter: &Unit| letter.character.script() == script;
        let is_mark = is_enclosing(unit.character)
            || (canonical_combining_class(unit.character) != 0
                && (script == Script::Inherited || !unmarked.last().is_some_and(is_own)));
        if !is_mark {
            unmarked.push(unit.clone());
        }
    }
    unmarked
}

/// Replaces letters that look like ASCII letters with those, in words that mix scripts.
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

/// The ASCII letter or digit that a character resembles, in its own case or the other.
fn ascii_of(character: char) -> Option<char> {
    if character.is_ascii() {
        return None;
    }
    let lower = single(character.to_lowercase());
    let upper = single(character.to_uppercase());
    if character.is_uppercase() {
        // The lower case first: a capital I looks like an l, but its lower case is an i.
        lower.and_then(look_alike).map(|found| found.to_ascii_uppercase()).or_else(|| look_alike(character))
    } else {
        look_alike(character).or_else(|| upper.and_then(look_alike).map(|found| found.to_ascii_lowercase()))
    }
}

fn look_alike(character: char) -> Option<char> {
    let mut bytes = [0; 4];
    let prototype: String = skeleton(character.encode_utf8(&mut bytes)).collect();
    match &*prototype {
        // The skeleton of an ASCII m, too.
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

    /// Whether any reading of the text matches.
    fn reads(pattern: &str, text: &str) -> bool {
        let pattern = Regex::new(pattern).unwrap();
        pattern.is_match(text) || views(text, false).unwrap().iter().any(|view| pattern.is_match(&view.text))
    }

    #[test]
    fn the_patterns_are_valid() {
        let all = [&INVISIBLE, &EMPHASIS, &LINK, &ESCAPE, &TAG];
        assert!(all.iter().all(|pattern| pattern.is_some()));
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
            "ca\u{20e3}si\u{20dd}no",
            "ca\u{489}sino",
            "ca\u{483}si\u{5bf}no",
            "ca\u{1}si\u{7f}no\u{85}",
            "* ca*si*no",
            "a * ca*si*no",
            "\\* ca*si*no",
            "***ca**si*no",
            "**ca*si***no",
            "*hi\nca*sino",
            "ca~si~no",
            "[ca](x)sino",
            "ca[](x)sino",
            "![ca](x)sino",
            "ca\\*\\*sino",
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
            "casiոo",
            "CАSІNО",
        ] {
            assert!(reads(r"(?i)\bcasino\b", text), "{text}: {:?}", views(text, false).unwrap());
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
            // Decomposed, as some keyboards and file systems write it.
            let apart: String = sentence.nfd().collect();
            assert!(!reads(words, &apart), "{apart}: {:?}", views(&apart, false).unwrap());
            assert!(!reads(words, sentence), "{sentence}: {:?}", views(sentence, false).unwrap());
            // Without a Latin letter there is nothing to fold, so no view has one.
            let is_latin = |text: &str| text.bytes().any(|byte| byte.is_ascii_alphabetic());
            assert!(
                is_latin(sentence) || views(sentence, false).unwrap().iter().all(|view| !is_latin(&view.text)),
                "{sentence}"
            );
        }
        for honest in ["snake_case_name", "2*3=6", "10*20*30", "m0dern rn", "1 < 2 [3]", "C:\\dir"] {
            assert_eq!(views(honest, false).unwrap(), [], "{honest}");
        }
        let (sentence, longest) = ("\u{fdfa}", "\u{fdfa}".repeat(1_000));
        assert!(views(&longest, false) == Err(TooLong) || views(sentence, false).is_ok());
        let parted = views("<p>ca</p><p>sino</p> <b>ca</b>sino", true).unwrap();
        assert_eq!(parted[0].text.split_whitespace().collect::<Vec<_>>(), ["ca", "sino", "casino"]);
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
            let found = views(text, false)
                .unwrap()
                .iter()
                .find_map(|view| Some(view.original(pattern.find(&view.text)?.range())));
            assert_eq!(&text[found.unwrap()], expected);
        }
    }

    proptest! {
        /// Every range of a view represents a part of the text that begins and ends at character boundaries.
        #[test]
        fn every_place_is_one_of_the_text(text in "[a-c*_~`\u{200b}\u{301}\u{336}а-вﬁ한\u{1161}é\u{1f600}\n ]{0,40}", any in any::<String>()) {
            for text in [text, any] {
                for view in views(&text, false).unwrap_or_default() {
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
