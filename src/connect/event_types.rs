//! `--event-types`: expands globs into the exact names of Stream's event types.

use super::stream_api::StreamApi;
use crate::exit::BadUsage;
use streamgate_core::event_types::in_hooks;
use streamgate_core::pattern::Pattern;
use streamgate_service::config::reader::nearest;

/// Returns an empty list for every event, as Stream understands it.
pub(super) async fn expand(globs: &[String], api: &StreamApi) -> anyhow::Result<Vec<String>> {
    let parse = |glob: &String| {
        let parsed = Pattern::parse(glob.trim());
        parsed.map_err(|error| BadUsage(format!("--event-types {glob}: {error}")))
    };
    let patterns = globs.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    if patterns.is_empty() || patterns.iter().any(Pattern::is_everything) {
        return Ok(Vec::new());
    }
    let listed = match api.event_types().await {
        Ok(listed) => listed,
        Err(error) if error.is_not_found() => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let known = if listed.is_empty() {
        tracing::warn!("Stream does not list its event types here; going by those that it documents");
        in_hooks().map(str::to_owned).collect()
    } else {
        listed
    };
    let known: Vec<&str> = known.iter().map(String::as_str).filter(|name| *name != "*").collect();
    let mut chosen: Vec<String> = Vec::new();
    for pattern in &patterns {
        let matching: Vec<_> =
            known.iter().filter(|name| pattern.matches(name)).map(|name| (*name).to_owned()).collect();
        if matching.is_empty() {
            return Err(unknown(pattern.as_str(), &known).into());
        }
        chosen.extend(matching);
    }
    chosen.sort();
    chosen.dedup();
    Ok(chosen)
}

fn unknown(pattern: &str, known: &[&str]) -> BadUsage {
    let near = nearest(pattern, known.iter().copied());
    let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
    BadUsage(format!(
        "--event-types {pattern}: Stream has no such event{hint} (`streamgate send --list-types` lists those that it documents)"
    ))
}
