//! Output of commands on stdout, for users and scripts; logs never go there.

#[cfg(feature = "cli")]
use indicatif::{ProgressBar, ProgressStyle};
use std::borrow::Cow;
use std::io::{self, Write};

/// Prints a line, with every character that could control a terminal made visible. A closed pipe (`| head`) is not our
/// error: the rest is simply not printed.
pub fn line(text: impl std::fmt::Display) -> io::Result<()> {
    let text = text.to_string();
    bytes(format!("{}\n", visible(&text)).as_bytes())
}

/// Escapes control characters, which a terminal obeys, and bidirectional overrides, which make a line look different
/// from what it is: chat text and servers' errors may contain them. They become `\u` and four digits, which JSON reads
/// as the same character.
pub fn visible(text: &str) -> Cow<'_, str> {
    let hides = |character: char| {
        (character.is_control() && character != '\n')
            || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(hides) {
        return Cow::from(text);
    }
    let escaped = |shown: String, character: char| {
        if hides(character) {
            shown + &format!("\\u{:04x}", u32::from(character))
        } else {
            shown + &character.to_string()
        }
    };
    Cow::from(text.chars().fold(String::new(), escaped))
}

/// Prints a service's greeting on a thread of its own: a stdout that nobody reads must not block the service, and a
/// failing one is no reason to exit.
pub fn greet(greeting: String) {
    std::thread::spawn(move || {
        if let Err(error) = line(greeting) {
            tracing::warn!(%error, "cannot write to stdout; going on");
        }
    });
}

/// Characters of a line: from COLUMNS or the terminal, else 80.
#[cfg(feature = "cli")]
pub fn width() -> usize {
    let given = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let terminal = || rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| size.ws_col.into());
    given.or_else(terminal).filter(|width| *width > 0).unwrap_or(80)
}

pub fn bytes(bytes: &[u8]) -> io::Result<()> {
    match io::stdout().lock().write_all(bytes) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// A progress bar on stderr, for more than a few `things`. Drawn only on a terminal, and not for scripts.
#[cfg(feature = "cli")]
pub fn bar(length: u64, things: &str, script: bool) -> ProgressBar {
    if length < 2 || script {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length);
    // The bar takes the width that the figures leave.
    let template = format!("{{wide_bar}} {{pos}}/{{len}} {things}, {{per_sec}}, {{eta}} left");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_control_sequence_reaches_a_terminal() {
        let cases = [
            ("a line\nof text, \u{e9}\u{1f389}", "a line\nof text, \u{e9}\u{1f389}"),
            ("\u{1b}[2J", "\\u001b[2J"),
            ("\u{9b}2J\u{7f}\r\0", "\\u009b2J\\u007f\\u000d\\u0000"),
            ("\u{202e}gpj.exe\u{2066}", "\\u202egpj.exe\\u2066"),
        ];
        for (text, shown) in cases {
            assert_eq!(visible(text), shown);
        }
        let json = serde_json::json!({"id": "\u{9b}\u{202e}\u{1b}"});
        assert_eq!(serde_json::from_str::<serde_json::Value>(&visible(&json.to_string())).unwrap(), json);
    }
}
