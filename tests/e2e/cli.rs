//! The command line: help, and every mistake of a settings file at once.

use std::process::{Command, Output};

fn adit(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_adit")).args(arguments).env_remove("ADIT_STATE").output().unwrap()
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn help_tells_the_commands_and_the_lines_to_try() {
    let help = adit(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let text = said(&help.stdout);
    for part in ["run", "check", "--state", "--config", "ssh -p 2222 -R web:80:localhost:8000", "Exit codes"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

#[test]
fn check_tells_every_mistake_with_key_and_fix() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.toml");
    let bad = "[nod]\nx = 1\n[node]\nwrokers = 2\n[log]\nlevel = \"loud\"\n[ingress]\nports = \"9-1\"\nhttp = \"80\"\n";
    std::fs::write(&file, bad).unwrap();
    let checked = adit(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(checked.status.code(), Some(2));
    let text = said(&checked.stdout);
    for key in ["nod:", "node.wrokers:", "log.level:", "ingress.ports:", "ingress.http:"] {
        assert!(text.contains(key), "{key} is not in:\n{text}");
    }
    assert!(text.contains("did you mean \"workers\"?"), "{text}");
    assert_eq!(text.matches("fix: ").count(), 5, "{text}");
}

#[test]
fn check_is_content_with_the_documented_files() {
    for file in ["config/adit.toml", "config/dev.toml"] {
        let checked = adit(&["check", "--config", file]);
        assert_eq!((checked.status.code(), said(&checked.stdout).as_str()), (Some(0), "ok\n"), "{file}");
    }
}

#[test]
fn wrong_settings_and_a_missing_file_end_with_2_and_start_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.toml");
    std::fs::write(&file, "[node\n").unwrap();
    for file in [file, dir.path().join("missing.toml")] {
        let run = adit(&["run", "--config", file.to_str().unwrap()]);
        assert_eq!(run.status.code(), Some(2));
        assert!(said(&run.stderr).contains("fix: "), "{}", said(&run.stderr));
    }
    assert_eq!(adit(&["run"]).status.code(), Some(2));
    assert_eq!(adit(&["fly"]).status.code(), Some(2));
}

#[test]
fn a_taken_port_ends_with_3_and_names_the_listener() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (file, state) = (dir.path().join("adit.toml"), dir.path().join("state"));
    let addr = taken.local_addr().unwrap();
    let text = format!(
        "[ingress]\nhttp = [\"{addr}\"]\nhttps = [\"127.0.0.1:0\"]\nraw = []\n\
         [ssh]\nlisten = [\"127.0.0.1:0\"]\n[control]\nlisten = [\"127.0.0.1:0\"]\n"
    );
    std::fs::write(&file, text).unwrap();
    let run = adit(&["run", "--config", file.to_str().unwrap(), "--state", state.to_str().unwrap()]);
    assert_eq!(run.status.code(), Some(3), "{}", said(&run.stderr));
    let text = said(&run.stderr);
    assert!(text.contains("ingress.http") && text.contains(&addr.to_string()), "{text}");
}
