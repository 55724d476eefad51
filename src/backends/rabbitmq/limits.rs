//! What RabbitMQ cannot do, held against a configuration that works on it.

use super::prefetch;
use std::time::Duration;
use streamgate_service::config::Config;
use streamgate_service::config::reader::Problem;

/// The longest `x-message-ttl` that RabbitMQ takes: it counts milliseconds in 32 bits.
const LONGEST_TTL: Duration = Duration::from_millis(u32::MAX as u64);

/// Every value that RabbitMQ's limits rule out.
pub(in crate::backends) fn problems(config: &Config) -> Vec<Problem> {
    let worker = &config.worker;
    let mut problems = Vec::new();
    let handlers: usize = worker.routes.iter().map(|route| route.concurrency).sum();
    if handlers.max(worker.concurrency) > prefetch::MOST_HANDLERS {
        let most = prefetch::MOST_HANDLERS;
        let what = format!("must be at most {most} with RabbitMQ, all routes together: run more workers");
        problems.push(Problem::new("worker.concurrency", what));
    }
    problems.extend(handler_timeout("worker", worker.handler_timeout));
    problems.extend(ladder("worker", &worker.retry));
    for (place, route) in worker.routes.iter().enumerate() {
        let path = format!("worker.routes[{}]", place + 1);
        // A value that the route inherits is reported where it was given.
        if route.handler_timeout != worker.handler_timeout {
            problems.extend(handler_timeout(&path, route.handler_timeout));
        }
        if route.retry != worker.retry {
            problems.extend(ladder(&path, &route.retry));
        }
    }
    problems
}

fn handler_timeout(path: &str, timeout: Duration) -> Option<Problem> {
    let what = "must be under 15m with RabbitMQ: at 30m it takes a delivery back";
    (timeout >= prefetch::LONGEST_WAIT).then(|| Problem::new(format!("{path}.handler_timeout"), what))
}

fn ladder(path: &str, steps: &[Duration]) -> Vec<Problem> {
    let too_long = steps.iter().enumerate().filter(|(_, step)| **step > LONGEST_TTL);
    let problem = |(place, step): (usize, &Duration)| {
        let days = step.as_secs() / (24 * 60 * 60);
        let what = format!("step {}, {days} days, is over the 49 days that RabbitMQ can wait", place + 1);
        Problem::new(format!("{path}.retry"), what)
    };
    too_long.map(problem).collect()
}

#[cfg(test)]
mod tests {
    use crate::backends::problems as problems_of_any;
    use crate::backends::rabbitmq::for_services;
    use streamgate_service::config::{self, Environment, Source, from_text};

    #[test]
    fn a_value_over_rabbitmqs_limits_is_an_error_for_the_services() {
        let services = |text: &str| {
            let loaded = for_services(from_text(None, Some(text), &Environment::of([])).unwrap());
            loaded.map(drop).map_err(|error| error.to_string())
        };
        for wrong in ["handler_timeout = '15m'", "concurrency = 3000", "retry = ['60days']"] {
            assert!(services(&format!("[worker]\n{wrong}")).is_err(), "{wrong}");
        }
        let route = |keys: &str| format!("[[worker.routes]]\nevents = ['*']\nexec = {{ command = ['x'] }}\n{keys}\n");
        for wrong in ["handler_timeout = '15m'", "retry = ['60days']"] {
            let (key, _) = wrong.split_once(' ').unwrap();
            let error = services(&route(wrong)).unwrap_err();
            assert!(error.contains(&format!("worker.routes[1].{key}")), "{wrong}: {error}");
        }
        let two = route("name = 'a'\nconcurrency = 1000") + &route("name = 'b'\nconcurrency = 600");
        assert!(services(&two).is_err_and(|error| error.contains("all routes together")));
    }

    #[test]
    fn a_value_over_a_limit_is_reported_with_its_line_or_variable() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("test.toml");
        std::fs::write(&file, "[rabbitmq]\n[worker]\nconcurrency = 3000\n").unwrap();
        let load = |environment: Environment| {
            let error = config::load(&Source { file: Some(file.clone()), environment }, problems_of_any).unwrap_err();
            error.to_string()
        };
        assert!(
            load(Environment::default()).contains("line 3: worker.concurrency: must be at most 1500"),
            "{}",
            load(Environment::default())
        );
        let named = load(Environment::of([("STREAMGATE__WORKER__CONCURRENCY", "4000")]));
        assert!(named.contains("set by the environment variable STREAMGATE__WORKER__CONCURRENCY"), "{named}");
    }
}
