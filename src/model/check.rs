//! How a socket's tunnels are asked whether their origin serves.

use std::time::Duration;

use serde_json::{Value, json};

use crate::fields::Fields;

/// A check of a socket's origin, which the node of each tunnel makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What is asked for by HTTP GET; an answer of 200 to 399 passes. None: that a
    /// connection opens is enough.
    pub path: Option<String>,
    /// How often. 10 s.
    pub every: Duration,
    /// How long one may take. 2 s, or as long as `every`.
    pub timeout: Duration,
    /// So many in a row must fail until visitors go elsewhere. 2.
    pub fail_after: u32,
    /// So many in a row must pass until they come back. 2.
    pub pass_after: u32,
}

/// The longest path, in bytes.
const PATH_MAX: usize = 1024;

impl Check {
    /// Reads a record's `check`.
    pub(super) fn read(f: &mut Fields, speaks_http: bool) -> Self {
        let every = f.take("every", Duration::from_secs(10));
        let check = Self {
            path: f.optional("path"),
            every,
            timeout: f.take("timeout", every.min(Duration::from_secs(2))),
            fail_after: f.take("fail_after", 2),
            pass_after: f.take("pass_after", 2),
        };
        f.refuse_rest();
        let is_path = |path: &String| {
            path.starts_with('/')
                && path.len() <= PATH_MAX
                && !path.contains('#')
                && path.bytes().all(|b| b.is_ascii_graphic())
        };
        match &check.path {
            Some(_) if !speaks_http => {
                let fix = "leave it out: that a connection opens is checked";
                f.mistake("path", "only types http and https can be asked for it".into(), fix.into());
            }
            Some(path) if !is_path(path) => {
                f.mistake("path", "is not a path".into(), "write one like \"/health?full=1\"".into());
            }
            _ => {}
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(3600)).contains(&check.every) {
            f.mistake("every", format!("{:?} is out of range", check.every), "write 1s to 1h".into());
        }
        if check.timeout.is_zero() || check.timeout > check.every {
            f.mistake("timeout", format!("{:?} is out of range", check.timeout), "write up to `every`".into());
        }
        for (key, count) in [("fail_after", check.fail_after), ("pass_after", check.pass_after)] {
            if !(1..=100).contains(&count) {
                f.mistake(key, format!("{count} is out of range"), "write 1 to 100".into());
            }
        }
        check
    }

    pub(super) fn to_value(&self) -> Value {
        json!({
            "path": self.path,
            "every": format!("{}ms", self.every.as_millis()),
            "timeout": format!("{}ms", self.timeout.as_millis()),
            "fail_after": self.fail_after,
            "pass_after": self.pass_after,
        })
    }
}
