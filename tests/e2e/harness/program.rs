//! A child process whose output is kept and can be waited for.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// A running program. Dropping it kills and reaps it.
pub struct Program {
    name: String,
    child: Child,
    output: Arc<Mutex<String>>,
    grown: watch::Receiver<()>,
}

impl Program {
    /// Starts `command`; its standard input stays open and empty.
    pub fn start(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{name} ({command:?}): {e}"));
        let output = Arc::<Mutex<String>>::default();
        let (grow, grown) = watch::channel(());
        let out: Box<dyn Read + Send> = Box::new(child.stdout.take().unwrap());
        let err: Box<dyn Read + Send> = Box::new(child.stderr.take().unwrap());
        for mut pipe in [out, err] {
            let (output, grow) = (Arc::clone(&output), grow.clone());
            std::thread::spawn(move || {
                let mut chunk = [0; 4096];
                while let Ok(n @ 1..) = pipe.read(&mut chunk) {
                    output.lock().unwrap().push_str(&String::from_utf8_lossy(&chunk[..n]));
                    grow.send_replace(());
                }
            });
        }
        Self { name: name.to_owned(), child, output, grown }
    }

    /// All that it has said on both outputs.
    pub fn output(&self) -> String {
        self.output.lock().unwrap().clone()
    }

    /// Waits until `needle` has been said `times` times.
    pub async fn wait_for(&self, needle: &str, times: usize, limit: Duration) {
        let mut grown = self.grown.clone();
        let said = async {
            while self.output.lock().unwrap().matches(needle).count() < times {
                if grown.changed().await.is_err() {
                    // Both pipes are closed: the last bytes may have come with it.
                    return self.output.lock().unwrap().matches(needle).count() >= times;
                }
            }
            true
        };
        match tokio::time::timeout(limit, said).await {
            Ok(true) => {}
            Ok(false) => panic!("{} ended without saying {needle:?}:\n{}", self.name, self.output()),
            Err(_) => panic!("{} did not say {needle:?} within {limit:?}:\n{}", self.name, self.output()),
        }
    }

    /// Writes a line to its standard input.
    pub fn tell(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(format!("{line}\n").as_bytes()).and_then(|()| input.flush()).unwrap();
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it is still running.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends it a signal by name: `TERM`, `STOP`, `HUP`.
    pub fn signal(&self, name: &str) {
        // The shell's own kill: present wherever a shell is.
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.pid())]).status().unwrap();
        assert!(status.success(), "cannot signal {}", self.name);
    }

    /// Ends it without a chance to clean up.
    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        let by = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < by, "{} did not end within {limit:?}:\n{}", self.name, self.output());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits for its end, and for the last of what it says (its pipes close with
    /// it, and are read by others).
    pub async fn finished(&mut self, limit: Duration) -> (ExitStatus, String) {
        let status = self.ended(limit).await;
        let mut grown = self.grown.clone();
        let closed = async { while grown.changed().await.is_ok() {} };
        assert!(tokio::time::timeout(limit, closed).await.is_ok(), "{}'s output does not end", self.name);
        (status, self.output())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.name, self.output());
        }
    }
}
