//! The files in deploy/ hold: operators' tools accept them, and they name metrics, services and files that exist.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

fn run(program: &str, args: &[&str]) -> Output {
    let path = format!("/usr/sbin:{}", std::env::var("PATH").unwrap());
    let output = Command::new(program).args(args).current_dir(directory()).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; tests/run installs it"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output
}

fn read(name: &str) -> String {
    std::fs::read_to_string(directory().join(name)).unwrap()
}

#[test]
fn prometheus_accepts_the_configuration_and_the_alerts_fire_when_they_should() {
    run("promtool", &["check", "config", "prometheus.yml"]);
    run("promtool", &["check", "rules", "alerts.yml"]);
    run("promtool", &["test", "rules", "alerts_test.yml"]);
}

#[test]
fn every_metric_of_the_alerts_is_declared() {
    let declared = std::fs::read_to_string(directory().join("../shared/service/src/metrics.rs")).unwrap();
    let alerts = read("alerts.yml");
    let is_name = |byte: char| byte.is_ascii_alphanumeric() || byte == '_';
    let metrics: Vec<_> = alerts.split(|byte| !is_name(byte)).filter(|word| word.starts_with("streamgate_")).collect();
    assert!(metrics.len() > 10, "{metrics:?}");
    for metric in metrics {
        let name = metric.trim_start_matches("streamgate_").trim_end_matches("_bucket");
        assert!(declared.contains(&format!("\"{name}\"")), "{metric}");
    }
    // Every reason that an alert looks for is one that the gateway gives.
    for reason in [
        "store_unavailable",
        "store_full",
        "deadline_exceeded",
        "in_flight_limit",
        "memory_budget",
        "unknown_key",
        "no_worker",
        "unhandled",
        "hook_failed",
        "hook_timeout",
    ] {
        assert!(alerts.contains(reason) && streamgate_core::reason::Reason::parse(reason).is_some(), "{reason}");
    }
}

#[test]
fn haproxy_accepts_its_configuration() {
    run("haproxy", &["-c", "-f", "haproxy.cfg"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_compose_file_names_services_volumes_and_files_that_exist() {
    let script = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open('compose.yml'))))";
    let python = crate::interop::installed("python/bin/python");
    let printed = run(python.to_str().unwrap(), &["-c", script]);
    let compose: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    let services = compose["services"].as_object().unwrap();
    for (name, service) in services {
        for mount in service["volumes"].as_array().into_iter().flatten() {
            let source = mount.as_str().unwrap().split(':').next().unwrap();
            match source.strip_prefix("./") {
                Some(file) => assert!(directory().join(file).is_file(), "{name} mounts {file}"),
                None => assert!(compose["volumes"].get(source).is_some(), "{name} mounts {source}"),
            }
        }
        for other in service["depends_on"].as_array().into_iter().flatten() {
            assert!(services.contains_key(other.as_str().unwrap()), "{name} depends on {other}");
        }
    }
    for gateway in ["gateway-a", "gateway-b"] {
        assert!(services.contains_key(gateway));
        assert!(read("haproxy.cfg").contains(&format!("{gateway}:8080")));
        assert!(read("prometheus.yml").contains(&format!("{gateway}:9464")));
    }
    assert!(services.contains_key("worker") && read("prometheus.yml").contains("names: [worker]"));
    let volume = |name: &str| services[name]["volumes"][1].clone();
    assert_ne!(volume("gateway-a"), volume("gateway-b"), "no two gateways share a directory");
    // The services' commands and environment are valid.
    for (service, command) in [("gateway-a", "gateway"), ("worker", "worker")] {
        assert_eq!(services[service]["command"], serde_json::json!([command]));
        let mut check = crate::harness::process::bare_command(&["check", "--json"]);
        for (name, value) in services[service]["environment"].as_object().unwrap() {
            let file = directory().join("streamgate.toml").display().to_string();
            check.env(name, if name == "STREAMGATE_CONFIG" { file } else { value.as_str().unwrap().to_owned() });
        }
        let checked = check.output().await.unwrap();
        // The hosts do not exist here, but the configuration is valid.
        let report: serde_json::Value = serde_json::from_slice(&checked.stdout).unwrap();
        assert_eq!((checked.status.code(), &report["checks"][0]["ok"]), (Some(1), &true.into()), "{report}");
    }
}

#[test]
fn the_units_start_commands_that_exist() {
    for (unit, command) in [("streamgate", "up"), ("streamgate-gateway", "gateway"), ("streamgate-worker", "worker")] {
        let text = read(&format!("{unit}.service"));
        assert!(text.contains(&format!("\nExecStart=/usr/local/bin/streamgate {command} --config ")), "{unit}");
        assert!(
            text.contains("\nStartLimitIntervalSec=0\n") && text.contains("\nRestartPreventExitStatus=64\n"),
            "{unit}"
        );
        assert!(text.contains(&format!("\nStateDirectory={unit}\n")) && text.contains("\nDynamicUser=yes\n"), "{unit}");
    }
}
