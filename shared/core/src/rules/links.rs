//! Finds links as chat clients do: addresses with a scheme, and bare domains with an existing top-level domain.

use regex::Regex;
use std::sync::LazyLock;

static SCHEME: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"(?i)(?:https?|ftps?)://").ok());
static TARGET: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\]\(\s*<?([^)\s>]+)").ok());
/// Labels with dots between them.
static DOMAIN: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?:[\p{L}\p{N}](?:[\p{L}\p{N}-]*[\p{L}\p{N}])?\.)+[\p{L}\p{N}-]*[\p{L}\p{N}]").ok());
/// Characters besides white space that end an address.
const ENDS: [char; 8] = ['<', '>', '"', '\'', '(', ')', '[', ']'];

/// The addresses of a text's links, in lower case, without scheme and closing slash. Mail addresses do not count.
pub(super) fn links(text: &str) -> Vec<String> {
    let (Some(scheme), Some(domain)) = (&*SCHEME, &*DOMAIN) else { return Vec::new() };
    let mut links = Vec::new();
    let starts: Vec<_> = scheme.find_iter(text).map(|found| (found.start(), found.end())).collect();
    let mut rest = 0;
    for (place, (start, end)) in starts.iter().enumerate() {
        bare(&text[rest..*start], domain, &mut links);
        let next = starts.get(place + 1).map_or(text.len(), |(next, _)| *next);
        let address = address(&text[*end..next]);
        rest = end + address.len();
        links.push(address);
    }
    bare(&text[rest..], domain, &mut links);
    // A markdown link leads to its target in whatever form the target is written.
    let targets = TARGET.iter().flat_map(|target| target.captures_iter(text)).filter_map(|found| found.get(1));
    for target in targets.map(|target| target.as_str()) {
        let is_known = links.iter().any(|link| target.contains(link));
        if !is_known && !target.starts_with('#') && !target.to_ascii_lowercase().starts_with("mailto:") {
            links.push(target);
        }
    }
    links.iter().map(|link| link.trim_end_matches(['/', '.', ',', '!', '?', ';']).to_lowercase()).collect()
}

/// The text up to the end of the link that begins here.
fn address(text: &str) -> &str {
    let is_end = |character: char| character.is_whitespace() || ENDS.contains(&character);
    text.split(is_end).next().unwrap_or_default()
}

/// Finds domains without a scheme.
fn bare<'t>(text: &'t str, domain: &Regex, links: &mut Vec<&'t str>) {
    let mut from = 0;
    while let Some(found) = domain.find_at(text, from) {
        let is_letter = |near: Option<char>| near.is_some_and(char::is_alphanumeric);
        let local = text[..found.start()].strip_suffix('@').map(|before| is_letter(before.chars().next_back()));
        let domain_of = text[found.end()..].strip_prefix('@').map(|after| is_letter(after.chars().next()));
        let is_mail = local.or(domain_of).unwrap_or_default();
        let last = found.as_str().rsplit('.').next().unwrap_or_default();
        let starts_www = found.as_str().get(..4).is_some_and(|start| start.eq_ignore_ascii_case("www."));
        from = found.end();
        if !is_mail && (starts_www || tld::exist(&last.to_ascii_lowercase())) {
            if text[from..].starts_with(['/', '?', '#', ':']) {
                from += address(&text[from..]).len();
            }
            links.push(&text[found.start()..from]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_table_of_texts() {
        for (text, expected) in [
            ("see http://a.b", 1),
            ("HTTP://a.b,https://c.d", 2),
            ("http://localhost:3000/x and https://1.2.3.4/", 2),
            ("evil.com", 1),
            ("EVIL.COM/path.io?x=1", 1),
            ("[win](evil.com)", 1),
            ("//evil.com", 1),
            ("visit @evil.com", 1),
            ("evil.com@", 1),
            ("[win](//93.184.216.34/x) [win](http:/93.184.216.34/x)", 2),
            (r"[win](http:\\93.184.216.34)", 1),
            ("[win](//evil%2ecom)", 1),
            ("[mail](mailto:ann@example.com) [top](#top)", 0),
            ("(www.a.b) www.c.d", 2),
            ("go to evil.com.", 1),
            ("evil.com, and good.org!", 2),
            ("evil.com,good.org", 2),
            ("ftp://evil.com/x", 1),
            ("a-b.c-d.co.uk", 1),
            ("ann@example.com, a.com@example.com", 0),
            ("hello. how are you", 0),
            ("node.js and v1.2.3 and e.g. this", 0),
            ("3.50 or 10.30", 0),
            ("awww.so sweet", 1),
            ("привет.как дела", 0),
            ("", 0),
        ] {
            assert_eq!(links(text).len(), expected, "{text}: {:?}", links(text));
        }
        assert_eq!(links("https://Evil.com/ evil.com. (evil.com/a)"), ["evil.com", "evil.com", "evil.com/a"]);
    }

    proptest! {
        #[test]
        fn nothing_panics(text in any::<String>(), odd in "[a.@/:()\u{e9} ]{0,20}(http://)?[a.@/:com]{0,9}") {
            links(&text);
            links(&odd);
        }
    }
}
