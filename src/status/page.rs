//! The report as a page: what needs a person first, then the parts.

use super::report::{Known, Report, short};
use std::time::Duration;
use streamgate_core::duration::rounded;

/// The lines of the page, for a terminal of this width.
pub(super) fn lines(report: &Report, width: usize) -> Vec<String> {
    let mut attention = Vec::new();
    if report.ok {
        attention.push("Nothing needs a person.".to_owned());
    }
    for need in &report.attention {
        attention.push(format!("! {}", need.what));
        attention.extend(need.command.iter().map(|command| format!("    {command}")));
    }
    let mut lines = Vec::new();
    section(&mut lines, "SERVERS", &Known::Yes(report.servers.iter().collect()), |server| {
        let state = server.error.as_ref().map_or_else(|| "answers".to_owned(), |error| format!("away: {error}"));
        format!("{:18} {:24} {state}", server.name, server.at)
    });
    let now = jiff::Timestamp::now().as_millisecond();
    section(&mut lines, "PROCESSES", &by_reference(&report.instances), |instance| {
        let age = Duration::from_millis(u64::try_from(now - instance.started_at_ms).unwrap_or_default());
        let state = match (&instance.trouble, instance.ready) {
            (None, _) => "ready".to_owned(),
            (Some(trouble), true) => format!("ready, but {trouble}"),
            (Some(trouble), false) => format!("not ready: {trouble}"),
        };
        let spool = instance.spool.filter(|spool| spool.events > 0);
        let spool = spool.map(|spool| format!(", {} in the spool", spool.events)).unwrap_or_default();
        let (name, version, age) = (short(instance), &instance.version, rounded(age));
        format!("{name:32} {version:8} up {age:?}, {} in hand{spool}, {state}", instance.in_hand)
    });
    section(&mut lines, "QUEUES", &by_reference(&report.queues), |queue| {
        let consumers = queue.consumers.map(|consumers| format!("  {consumers} consumers")).unwrap_or_default();
        format!("{:40} {:>10}{consumers}", queue.name, queue.messages)
    });
    section(&mut lines, "ROUTES", &by_reference(&report.routes), |route| {
        let state = if route.state == "running" && !route.open_in.is_empty() { "open" } else { route.state };
        let parked = route.parked.map_or_else(|| "?".to_owned(), |events| events.to_string());
        let gone = if route.configured { "" } else { "  not in the configuration" };
        format!("{:24} {state:8} {parked:>10} parked{gone}", route.name)
    });
    match &report.dead_letters {
        Known::Yes(dead) => {
            lines.extend([String::new(), format!("DEAD LETTERS  {}", dead.count)]);
            for cause in dead.causes.iter().flatten() {
                let route = cause.route.as_deref().unwrap_or("-");
                let error = cause.error.as_ref().map(|error| format!("  {error}")).unwrap_or_default();
                lines.push(format!("{:>7}  {}  route {route}{error}", cause.count, cause.reason));
            }
        }
        Known::No { error } => lines.extend([String::new(), format!("DEAD LETTERS  not known: {error}")]),
    }
    let clipped = lines.into_iter().map(|line| line.chars().take(width.max(40)).collect());
    // What a person has to read and to paste is never cut.
    attention.into_iter().chain(clipped).collect()
}

fn by_reference<T>(known: &Known<Vec<T>>) -> Known<Vec<&T>> {
    match known {
        Known::Yes(values) => Known::Yes(values.iter().collect()),
        Known::No { error } => Known::No { error: error.clone() },
    }
}

fn section<T>(lines: &mut Vec<String>, title: &str, part: &Known<Vec<&T>>, line: impl Fn(&T) -> String) {
    lines.push(String::new());
    match part {
        Known::Yes(values) if values.is_empty() => lines.push(format!("{title}  none")),
        Known::Yes(values) => {
            lines.push(title.to_owned());
            lines.extend(values.iter().map(|value| format!("  {}", line(value))));
        }
        Known::No { error } => lines.push(format!("{title}  not known: {error}")),
    }
}
