//! The documents are correct: promises name tests that exist, and metrics and options are those of the program.

use crate::harness::process::{Setup, Site, bare_command};
use crate::harness::servers::Backends;
use crate::harness::wire::{Webhook, send};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

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

#[test]
fn every_invariant_names_tests_that_exist() {
    let architecture = read("ARCHITECTURE.md");
    let (_, invariants) = architecture.split_once("\n## Invariants\n").unwrap();
    let invariants = invariants.split("\n## ").next().unwrap();
    let mut files = Vec::new();
    sources(&root(), &mut files);
    let code: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let lines: Vec<_> = invariants.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert!(lines.len() >= 9, "one line for each promise");
    for line in lines {
        let tests = quoted(line.rsplit('|').nth(1).unwrap(), |_| true);
        assert!(!tests.is_empty(), "no test: {line}");
        for test in tests {
            assert!(
                code.contains(&format!("fn {test}(")) || code.contains(&format!("fn {test}<")),
                "no such test: {test}"
            );
        }
    }
}

#[test]
fn every_path_of_the_map_exists() {
    let map = read("ARCHITECTURE.md");
    let paths = quoted(&map, |word| word.contains('/') && word.ends_with(".rs"));
    assert!(paths.len() > 20, "{paths:?}");
    for path in paths {
        assert!(root().join(&path).is_file(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_of_the_readme_is_served_and_every_one_that_is_served_is_in_it() {
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
    let readme = quoted(&read("README.md"), |word| word.starts_with("streamgate_"));
    let documented: BTreeSet<_> = readme.iter().map(|metric| metric.split('{').next().unwrap().to_owned()).collect();
    assert!(documented.len() > 10, "{documented:?}");
    assert_eq!(
        documented.difference(&served).collect::<Vec<_>>(),
        Vec::<&String>::new(),
        "in the README, and not served"
    );
    assert_eq!(
        served.difference(&documented).collect::<Vec<_>>(),
        Vec::<&String>::new(),
        "served, and not in the README"
    );
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

#[tokio::test(flavor = "multi_thread")]
async fn every_option_of_the_readme_exists() {
    let readme = read("README.md");
    let mut help = String::new();
    for args in [
        &["--help"][..],
        &["up", "--help"],
        &["gateway", "--help"],
        &["worker", "--help"],
        &["check", "--help"],
        &["connect", "--help"],
        &["send", "--help"],
        &["dead", "list", "--help"],
        &["dead", "show", "--help"],
        &["dead", "replay", "--help"],
    ] {
        help.push_str(&String::from_utf8(bare_command(args).output().await.unwrap().stdout).unwrap());
    }
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
