//! Runs a command for each event: the body on its stdin, the event's metadata in its environment.

use crate::handler::{BoxFuture, Context, Event, Handler, HandlerError};
use rustix::process::{Pid, Signal, kill_process_group};
use std::convert::Infallible;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use streamgate_service::config::ExecConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// The exit code that asks for another attempt: `EX_TEMPFAIL` of sysexits.h.
const RETRY: i32 = 75;
/// The only variables a command inherits from our environment; any other may hold a secret.
const INHERITED: [&str; 7] = ["PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR"];
/// Errors that pass once other processes end, by their Linux numbers: EAGAIN, ENOMEM, ENFILE, EMFILE.
const EXHAUSTED: [i32; 4] = [11, 12, 23, 24];
/// Delay between tries to start a command during such a shortage.
const SHORTAGE: Duration = Duration::from_millis(100);
/// Bytes of a command's output read at a time.
const CHUNK: usize = 16 << 10;

/// Runs one command for each event.
#[derive(Clone, Debug)]
pub struct Exec(Arc<ExecConfig>);

impl Exec {
    pub fn new(config: &ExecConfig) -> Exec {
        Exec(Arc::new(config.clone()))
    }
}

impl Handler for Exec {
    fn handle(&self, event: Event, context: Context) -> BoxFuture<Result<(), HandlerError>> {
        let config = Arc::clone(&self.0);
        Box::pin(async move {
            let mut command = command(&config.command, &event, context.attempt);
            let ended = async {
                let child = spawn(&mut command).await.map_err(|error| {
                    let program = config.command.first().map(String::as_str).unwrap_or_default();
                    HandlerError::unavailable(format!("cannot run {program:?}: {error}"))
                })?;
                run(child, &event).await
            };
            match tokio::time::timeout(config.timeout, ended).await {
                Ok(ended) => ended,
                Err(_) => {
                    Err(HandlerError::unavailable(format!("the command did not end within {:?}", config.timeout)))
                }
            }
        })
    }
}

fn command(words: &[String], event: &Event, attempt: u32) -> Command {
    let (program, arguments) = words.split_first().map_or(("", words), |(program, rest)| (program.as_str(), rest));
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    command.envs(INHERITED.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command
        // From the envelope, where its length is bounded; the raw type is in the body.
        .env("STREAMGATE_TYPE", &event.envelope().event_type)
        .env("STREAMGATE_KEY", event.key())
        .env("STREAMGATE_ID", event.id())
        .env("STREAMGATE_ATTEMPT", attempt.to_string())
        .env("STREAMGATE_CID", event.cid().unwrap_or_default());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A process group of its own, so that everything the command started can be killed with it at the timeout and at the end of a
    // drain, and so that no signal meant for us reaches it.
    command.process_group(0).kill_on_drop(true);
    command
}

/// Starts the command. Waits out a shortage of system resources, which must not use up the event's attempts.
async fn spawn(command: &mut Command) -> std::io::Result<Child> {
    loop {
        match command.spawn() {
            Err(error) if error.raw_os_error().is_some_and(|code| EXHAUSTED.contains(&code)) => {
                tracing::debug!(%error, "cannot start a command yet");
                tokio::time::sleep(SHORTAGE).await;
            }
            started => return started,
        }
    }
}

/// Waits for the command to end and judges its exit code. If this is dropped first, the whole process group is killed.
async fn run(mut child: Child, event: &Event) -> Result<(), HandlerError> {
    let group = Group(child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?)));
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (mut output, mut errors) = (0, 0);
    let pumps = async {
        let write = async {
            // A failed write is ignored: a command need not read its stdin.
            if let Some(mut stdin) = stdin {
                stdin.write_all(event.body()).await.ok();
            }
        };
        tokio::join!(write, count(stdout, &mut output), count(stderr, &mut errors));
        // A command that closes its output may still be at work.
        std::future::pending::<Infallible>().await
    };
    let ended = tokio::select! {
        biased;
        // The exit comes first: a descendant that keeps writing must not hide it.
        ended = child.wait() => ended,
        never = pumps => match never {},
    };
    group.has_ended();
    let ended = ended.map_err(|error| HandlerError::retry(format!("cannot get the command's exit status: {error}")))?;
    // Only the sizes are logged: the output may contain what users wrote.
    tracing::debug!(key = event.key(), status = %ended, stdout_bytes = output, stderr_bytes = errors, "the command has ended");
    verdict(ended)
}

/// Reads everything and throws it away, so that the command never blocks on a full pipe.
async fn count(from: Option<impl AsyncRead + Unpin>, bytes: &mut u64) {
    let Some(mut from) = from else { return };
    let mut chunk = vec![0; CHUNK];
    while let Ok(read @ 1..) = from.read(&mut chunk).await {
        *bytes += read as u64;
    }
}

/// 0 is success, 75 asks for another attempt, and any other code means that no attempt can help. A killed command has decided
/// nothing.
fn verdict(ended: ExitStatus) -> Result<(), HandlerError> {
    match ended.code() {
        Some(0) => Ok(()),
        Some(RETRY) => Err(HandlerError::retry("the command asks for another attempt (exit code 75)")),
        Some(code) => Err(HandlerError::reject(format!("the command ended with exit code {code}"))),
        None => Err(HandlerError::retry(format!("the command was killed: {ended}"))),
    }
}

/// A process group that is killed on drop, unless its leader has ended.
struct Group(Option<Pid>);

impl Group {
    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Fails when the group is empty already.
            kill_process_group(group, Signal::KILL).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_table_of_exit_codes() {
        let judge = |code: i32| verdict(ExitStatus::from_raw(code << 8));
        assert_eq!(judge(0), Ok(()));
        assert_eq!(judge(75), Err(HandlerError::retry("the command asks for another attempt (exit code 75)")));
        for code in [1, 2, 74, 76, 126, 127, 255] {
            assert_eq!(judge(code), Err(HandlerError::reject(format!("the command ended with exit code {code}"))));
        }
        let killed = verdict(ExitStatus::from_raw(9)).unwrap_err();
        assert_eq!(killed, HandlerError::retry("the command was killed: signal: 9 (SIGKILL)"));
    }
}
