//! The documents are correct: promises name tests that exist, and metrics and options are those of the program.

use crate::harness::process::{Setup, Site, bare_command};
use crate::harness::servers::Backends;
use crate::harness::wire::{Webhook, send};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use streamgate::config::{ConfigError, Environment, from_text};

/// The README, and every page that it leads to.
const FOR_USERS: [&str; 7] = [
    "README.md",
    "docs/configuration.md",
    "docs/http.md",
    "docs/metrics.md",
    "docs/moderation.md",
    "docs/rabbitmq.md",
    "docs/runbook.md",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap()
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") && !path.ends_with(".git") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every `word` between backticks for which `is` holds.
fn quoted(text: &str, is: impl Fn(&str) -> bool) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).filter(|word| is(word)).map(str::to_owned).collect()
}

/// The numbered sentences of ARCHITECTURE.md's section of promises: the first line of each.
fn promises() -> Vec<String> {
    let architecture = read("ARCHITECTURE.md");
    let (_, section) = architecture.split_once("\n## Promises\n").unwrap();
    let lines = section.split("\n## ").next().unwrap().lines();
    let is_numbered = |line: &&str| line.split_once(". ").is_some_and(|(number, _)| number.parse::<u32>().is_ok());
    lines.filter(is_numbered).map(str::to_owned).collect()
}

#[test]
fn every_promise_names_tests_that_exist() {
    let (promises, document) = (promises(), read("tests/PROMISES.md"));
    assert!(promises.len() >= 12, "{promises:?}");
    let mut entries = document.split("\n## ");
    let introduction = entries.next().unwrap();
    assert!(introduction.starts_with("# "), "{introduction}");
    let entries: Vec<_> = entries.map(|entry| entry.split_once('\n').unwrap()).collect();
    let titles: Vec<_> = entries.iter().map(|(title, _)| (*title).to_owned()).collect();
    assert_eq!(titles, promises, "an entry for each promise, in its words");
    let mut files = Vec::new();
    sources(&root(), &mut files);
    let code: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    for (title, tests) in entries {
        let tests = quoted(tests, |_| true);
        assert!(!tests.is_empty(), "no test: {title}");
        for test in tests {
            assert!(
                code.contains(&format!("fn {test}(")) || code.contains(&format!("fn {test}<")),
                "no such test: {test}"
            );
        }
    }
}

/// The words between backticks at the beginning of a table's rows, for which `is` holds.
fn first_column(text: &str, is: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    rows.map(|(first, _)| first).filter(|word| is(word)).map(str::to_owned).collect()
}

#[test]
fn every_path_of_the_documents_exists() {
    let documents = ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "tests/PROMISES.md"];
    let text: String = documents.into_iter().map(read).collect();
    let roots =
        ["src/", "gateway/", "worker/", "shared/", "tests/", "benches/", "deploy/", "docs/", "examples/", "fuzz/"];
    let paths = quoted(&text, |word| roots.iter().any(|root| word.starts_with(root)));
    assert!(paths.len() > 60, "{paths:?}");
    for path in paths.iter().filter(|path| !path.contains([' ', '*', '<'])) {
        assert!(root().join(path).exists(), "{path}");
    }
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    for document in FOR_USERS.into_iter().chain(["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]) {
        // Code between backticks may look like a link.
        let text: String = read(document).split('`').step_by(2).collect();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link);
        for link in links.filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let directory = Path::new(document).parent().unwrap();
            let target = if path.is_empty() { PathBuf::from(document) } else { directory.join(path) };
            assert!(root().join(&target).exists(), "{document}: {link}");
            if !anchor.is_empty() {
                let titles = read(target.to_str().unwrap());
                let mut titles =
                    titles.lines().filter_map(|line| Some(line.strip_prefix('#')?.trim_start_matches('#').trim()));
                assert!(titles.any(|title| anchor_of(title) == anchor), "{document}: {link}");
            }
        }
    }
}

/// As GitHub makes it of a heading.
fn anchor_of(title: &str) -> String {
    let kept = title.chars().filter(|&char| char.is_alphanumeric() || matches!(char, ' ' | '-' | '_'));
    kept.map(|char| if char == ' ' { '-' } else { char.to_ascii_lowercase() }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_metrics_are_those_that_are_served() {
    let (alone, site, backends) = (Site::new(), Site::new(), Backends::shared().await);
    let rules = "[hooks.before_message_send]\nrules = [{ pattern = \"x\", action = \"reject\" }]".into();
    alone.configure(&Setup { rest: rules, ..Setup::default() });
    site.configure(&Setup { rest: backends.tables(&site.name()), ..Setup::default() });
    let up = alone.start().await;
    let gateway = site.start_as("gateway").await.ready().await;
    let worker = site.start_as("worker").await.ready().await;
    for (public, handles) in [(up.public, &up), (gateway.public, &worker)] {
        assert_eq!(send(public, &Webhook::fresh()).await.unwrap().status, 200);
        assert_eq!(send(public, &Webhook::moderation(r#"{"text":"x"}"#)).await.unwrap().status, 200);
        crate::harness::eventually("the event is handled", || async {
            handles.metric("streamgate_worker_deliveries_total{outcome=\"done\",route=\"log\"}").await == 1.0
        })
        .await;
    }
    crate::harness::eventually("the gateway has looked at the queues", || async {
        gateway.ops("/metrics").await.1.contains("streamgate_queue_messages{")
    })
    .await;
    let mut served = BTreeSet::new();
    for server in [&up, &gateway, &worker] {
        let text = server.ops("/metrics").await.1;
        let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        served.extend(names.filter(|name| name.starts_with("streamgate_")).map(str::to_owned));
    }
    let documented = first_column(&read("docs/metrics.md"), |word| word.starts_with("streamgate_"));
    assert!(documented.len() > 10, "{documented:?}");
    assert_eq!(documented, served, "docs/metrics.md, and what is served");
}

#[test]
fn the_documented_alerts_are_those_of_the_rules() {
    let rules = read("deploy/alerts.yml");
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).map(str::to_owned);
    let documented = first_column(&read("docs/metrics.md"), |word| word.starts_with("Streamgate"));
    assert_eq!(documented, alerts.collect());
}

/// Every alert leads to its section of the runbook, and every section is an alert's.
#[test]
fn every_alert_has_its_section_in_the_runbook() {
    let (rules, runbook) = (read("deploy/alerts.yml"), read("docs/runbook.md"));
    let alerts: Vec<_> =
        rules.split("- alert: ").skip(1).map(|rule| (rule.lines().next().unwrap().trim(), rule)).collect();
    let sections: Vec<_> = runbook.lines().filter_map(|line| line.strip_prefix("## Streamgate")).collect();
    let names: Vec<_> = alerts.iter().map(|(name, _)| name.strip_prefix("Streamgate").unwrap()).collect();
    assert_eq!(sections, names, "a section for each alert, in the order of the rules");
    for (name, rule) in alerts {
        let url = rule.lines().find_map(|line| line.trim().strip_prefix("runbook_url: "));
        let url = url.unwrap_or_else(|| panic!("{name} has no runbook_url"));
        let anchor = format!("docs/runbook.md#{}", anchor_of(name));
        assert!(url.trim_matches('"').ends_with(&anchor), "{name}: {url}");
    }
}

/// A configuration that has every key of the reference with some text for a value, and in each of its tables a key that is unknown.
fn config_of(keys: &BTreeSet<String>) -> serde_json::Value {
    let mut root = serde_json::json!({});
    for key in keys {
        let mut at = &mut root;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            let table = at.as_object_mut().unwrap();
            table.insert("unknown_here".into(), "x".into());
            let (name, is_list) = part.strip_suffix("[]").map_or((part, false), |name| (name, true));
            if parts.peek().is_none() {
                table.insert(name.into(), "x".into());
                break;
            }
            let empty = if is_list { serde_json::json!([{}]) } else { serde_json::json!({}) };
            let next = table.entry(name).or_insert(empty);
            at = if is_list { &mut next[0] } else { next };
        }
    }
    root
}

/// The reader names the keys of each table where it meets an unknown one: these are all that there are.
#[test]
fn the_documented_keys_are_those_that_are_read() {
    let keys =
        first_column(&read("docs/configuration.md"), |word| word.contains('.') && !word.starts_with("STREAMGATE"));
    assert!(keys.len() > 80, "{keys:?}");
    let text = toml::to_string(&config_of(&keys)).unwrap();
    let problems = match from_text(None, Some(&text), &Environment::of([])) {
        Err(ConfigError::Invalid { problems, .. }) => problems,
        other => panic!("{other:?}"),
    };
    let mut known = BTreeSet::new();
    for problem in problems.iter().filter(|problem| problem.what.starts_with("unknown key")) {
        let table = problem.key.strip_suffix("unknown_here");
        let table = table.unwrap_or_else(|| panic!("{} is documented, and not read", problem.key)).replace("[1]", "[]");
        let (_, names) = problem.what.split_once("this section takes: ").unwrap();
        known.extend(names.split(", ").map(|name| format!("{table}{name}")));
    }
    // Tables are no rows of their own.
    let is_table = |key: &String| {
        let below = [format!("{key}."), format!("{key}[].")];
        keys.iter().any(|documented| below.iter().any(|start| documented.starts_with(start)))
    };
    known.retain(|key| !is_table(key));
    assert_eq!(keys.difference(&known).collect::<Vec<_>>(), Vec::<&String>::new(), "documented, and not read");
    assert_eq!(known.difference(&keys).collect::<Vec<_>>(), Vec::<&String>::new(), "read, and not documented");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_readmes_example_is_a_valid_config() {
    let readme = read("README.md");
    // The second example is an addition to the first.
    let examples: Vec<_> =
        readme.split("```toml\n").skip(1).take(2).map(|rest| rest.split("```").next().unwrap()).collect();
    let example = examples.iter().flat_map(|text| text.lines()).map(|line| format!("{}\n", line.trim_start()));
    let example: String = example.collect();
    assert!(example.contains("[[worker.routes]]") && example.contains("[hooks.before_message_send]"));
    let site = Site::new();
    let file = site.write("example.toml", example);
    let mut command = bare_command(&["check", "--offline", "--config", file.to_str().unwrap()]);
    command.current_dir(site.path(".")).env("STREAM_API_SECRET", "s").env("APP_TOKEN", "t");
    let checked = command.output().await.unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

/// Every command with its help: `["dead", "list"]` and what `streamgate dead list --help` prints.
async fn helps() -> Vec<(Vec<String>, String)> {
    let (mut found, mut left) = (Vec::new(), vec![Vec::<String>::new()]);
    while let Some(command) = left.pop() {
        let args: Vec<_> = command.iter().map(String::as_str).chain(["--help"]).collect();
        let help = String::from_utf8(bare_command(&args).output().await.unwrap().stdout).unwrap();
        let listed = help.split("\nCommands:\n").nth(1).unwrap_or_default().lines().take_while(|line| !line.is_empty());
        let names = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let names = names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
        left.extend(names.map(|name| command.iter().cloned().chain([name.to_owned()]).collect()));
        found.push((command, help));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_is_in_the_readme() {
    let readme = read("README.md");
    let (_, table) = readme.split_once("\n## Commands\n").unwrap();
    let table = table.split("\n## ").next().unwrap();
    let commands: Vec<_> =
        helps().await.into_iter().map(|(command, _)| command).filter(|one| !one.is_empty()).collect();
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        let row = table.lines().find(|line| line.contains(&format!("`streamgate {}", command[0])));
        let row = row.unwrap_or_else(|| panic!("README.md, Commands, has no row for {command:?}"));
        assert!(command.iter().all(|name| row.contains(name.as_str())), "{command:?}: {row}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_option_exists() {
    let readme: String = FOR_USERS.into_iter().map(read).collect();
    let help: String = helps().await.into_iter().map(|(_, help)| help).collect();
    for option in quoted(&readme, |word| word.starts_with("--")) {
        let name = option.split([' ', '=']).next().unwrap();
        if !["--release", "--soak", "--bench"].contains(&name) {
            assert!(help.contains(name), "{option}");
        }
    }
}

/// The dependencies of a program with handlers of its own on the embedded store.
#[test]
fn a_bot_compiles_neither_rabbitmq_nor_redis_nor_the_command_line() {
    let tree = |features: &[&str]| {
        let mut cargo = std::process::Command::new(env!("CARGO"));
        cargo.args(["tree", "--offline", "--locked", "--edges", "normal", "--prefix", "none", "--no-default-features"]);
        let listed = cargo.args(features).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
        assert!(listed.status.success(), "{listed:?}");
        let text = String::from_utf8(listed.stdout).unwrap();
        text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect::<Vec<_>>()
    };
    let has = |tree: &[String], name: &str| tree.iter().any(|listed| listed == name);
    let alone = tree(&[]);
    assert!(has(&alone, "rusqlite") && has(&alone, "hyper"));
    for name in ["lapin", "redis", "clap", "indicatif"] {
        assert!(!has(&alone, name), "{name}");
    }
    let services = tree(&["--features", "services"]);
    assert!(has(&services, "lapin") && has(&services, "redis") && !has(&services, "clap"));
}
