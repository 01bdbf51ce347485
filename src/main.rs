//! Arguments, logging, runtime; and one exit code per kind of failure.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use adit::config::{Config, LogFormat, LogSettings};
use adit::cores::Cores;
use adit::fields::Mistake;
use adit::fleet::authority;
use adit::model::{AccountId, NodeId};
use adit::node;
use adit::status;
use adit::user;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The node ran and then failed.
const FAILED: u8 = 1;
/// Arguments or settings are wrong (clap ends with the same code).
const BAD_SETTINGS: u8 = 2;
/// The node could not start: a port is taken, the state folder not writable.
const NOT_STARTED: u8 = 3;

/// The edge of `ssh -R`: publishes services behind NAT under names and ports.
///
/// Without a command it runs a node for trying things out: loopback only,
/// everything it needs made up and kept in the state folder. It prints the ssh
/// line to copy and the URL to open.
#[derive(Parser)]
#[command(version, after_help = AFTER, subcommand_precedence_over_arg = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    node: NodeArguments,
}

#[derive(Args)]
struct NodeArguments {
    /// Folder for all that is kept between runs [default: node.state of the settings; ./.adit without settings]
    #[arg(long, value_name = "DIR", env = "ADIT_STATE", global = true)]
    state: Option<PathBuf>,
    /// Settings file (TOML); config/adit.toml explains every key
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run a node with a settings file
    #[command(after_help = AFTER)]
    Run,
    /// Check a settings file: tells every mistake at once, each with its key and how to mend it
    #[command(after_help = "Exit codes: 0 the file is good, 2 it has mistakes")]
    Check,
    /// Show how a running node of this machine is, and its fleet
    #[command(after_help = "Exit codes: 0 shown, 1 the node does not answer")]
    Status {
        /// All that it tells, as JSON
        #[arg(long)]
        json: bool,
        /// File of the operators' token (control.token_file), where the node did not make one
        #[arg(long, value_name = "FILE")]
        token: Option<PathBuf>,
    },
    /// Accounts of owners who publish by mysocketctl, at a running node of this machine
    #[command(subcommand)]
    User(UserCommand),
    /// Make certificates by which the nodes of a fleet know each other
    #[command(after_help = CA_HELP)]
    Ca {
        /// The nodes, by their node.name
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<NodeId>,
        /// Folder of the CA, made if there is none; keep ca.key there, and bring the rest to the nodes
        #[arg(long, value_name = "DIR", default_value = "fleet-ca")]
        dir: PathBuf,
        /// How long the nodes' certificates last
        #[arg(long, default_value_t = 365)]
        days: u32,
    },
}

#[derive(Subcommand)]
enum UserCommand {
    /// Make an account; its password is the first line of standard input
    #[command(after_help = "Exit codes: 0 made, 1 the node does not answer or refuses")]
    Add {
        /// Address by which they log in
        email: String,
        /// Whose it is
        #[arg(long)]
        name: Option<String>,
        /// File of their public SSH key, for clients that have no certificates
        #[arg(long, value_name = "FILE")]
        ssh_key: Option<PathBuf>,
        /// Id of the account, and SSH user of its tunnels [default: a made-up one]
        #[arg(long)]
        id: Option<AccountId>,
        /// File of the operators' token (control.token_file), where the node did not make one
        #[arg(long, value_name = "FILE")]
        token: Option<PathBuf>,
    },
}

const CA_HELP: &str = "\
Each node gets ca.pem and its own NODE.pem and NODE.key, named by fleet.ca, fleet.certificate
and fleet.key of its settings. To renew, run it again, copy the files and send SIGHUP.
Exit codes: 0 made, 2 the arguments or files are wrong";

const AFTER: &str = "\
Try it:
  adit                                               a node on this machine, in one terminal
  ssh -p 2222 -R web:80:localhost:8000 localhost     publish what listens on port 8000, in another
  curl --cacert .adit/tls/ca.pem https://web.edge.localhost:8443/

Signals: SIGTERM and SIGINT drain and end, a second one hurries; SIGHUP reads certificates again.
Exit codes: 0 ended as told, 1 failed while running, 2 wrong arguments or settings, 3 could not start";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Command::Ca { nodes, dir, days }) = &arguments.command {
        return make_certificates(nodes, dir, *days);
    }
    let NodeArguments { state, config } = arguments.node;
    if let Some(Command::Status { json, token }) = &arguments.command {
        return show_status(config.as_deref(), state, token.as_deref(), *json);
    }
    if let Some(Command::User(UserCommand::Add { email, name, ssh_key, id, token })) = &arguments.command {
        let new = user::New { email, name: name.as_deref(), ssh_key: ssh_key.as_deref(), id: id.as_ref() };
        return add_user(config.as_deref(), state, token.as_deref(), &new);
    }
    let loaded = match (&arguments.command, &config) {
        (None, None) => Config::dev(),
        (_, Some(file)) => Config::load(file),
        (Some(_), None) => {
            eprintln!("adit: this command needs --config FILE (see adit --help)");
            return ExitCode::from(BAD_SETTINGS);
        }
    };
    let mut settings = match loaded {
        Ok(settings) => settings,
        Err(mistakes) => {
            let lines = tell(&mistakes, config.as_deref());
            if let Some(Command::Check) = arguments.command {
                print!("{lines}");
            } else {
                eprint!("{lines}");
            }
            return ExitCode::from(BAD_SETTINGS);
        }
    };
    if let Some(Command::Check) = arguments.command {
        println!("ok");
        return ExitCode::SUCCESS;
    }
    if let Some(state) = state {
        settings.node.state = state;
    }
    run(settings)
}

fn add_user(config: Option<&Path>, state: Option<PathBuf>, token: Option<&Path>, new: &user::New<'_>) -> ExitCode {
    let (state, made) = match running(config, state) {
        Ok(running) => running,
        Err(code) => return code,
    };
    match user::add(&state, token.or(made.as_deref()), new) {
        Ok(id) => println!("{id}"),
        Err(why) => {
            eprintln!("adit: {why}");
            return ExitCode::from(FAILED);
        }
    }
    ExitCode::SUCCESS
}

/// The state folder of the running node, and the file of its token if it has one set.
fn running(config: Option<&Path>, state: Option<PathBuf>) -> Result<(PathBuf, Option<PathBuf>), ExitCode> {
    match config.map_or_else(Config::dev, Config::load) {
        Ok(settings) => Ok((state.unwrap_or(settings.node.state), settings.control.token_file)),
        Err(mistakes) => {
            eprint!("{}", tell(&mistakes, config));
            Err(ExitCode::from(BAD_SETTINGS))
        }
    }
}

fn show_status(config: Option<&Path>, state: Option<PathBuf>, token: Option<&Path>, json: bool) -> ExitCode {
    let (state, made) = match running(config, state) {
        Ok(running) => running,
        Err(code) => return code,
    };
    match status::ask(&state, token.or(made.as_deref())) {
        Ok(told) if json => println!("{told:#}"),
        Ok(told) => print!("{}", status::render(&told)),
        Err(why) => {
            eprintln!("adit: {why}");
            return ExitCode::from(FAILED);
        }
    }
    ExitCode::SUCCESS
}

fn make_certificates(nodes: &[NodeId], dir: &Path, days: u32) -> ExitCode {
    for node in nodes {
        match authority::make(dir, node, days) {
            Ok([certificate, key]) => println!("{}\n{}", certificate.display(), key.display()),
            Err(why) => {
                eprintln!("adit: {why}");
                return ExitCode::from(BAD_SETTINGS);
            }
        }
    }
    ExitCode::SUCCESS
}

fn run(settings: Config) -> ExitCode {
    log_to_stderr(&settings.log);
    let workers = match settings.node.workers {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        workers => workers,
    };
    // What serves nobody must not hold up who is served.
    let office = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().thread_name("adit").build();
    let (office, cores, runtimes) = match office.and_then(|office| Ok((office, Cores::start(workers)?))) {
        Ok((office, (cores, runtimes))) => (office, cores, runtimes),
        Err(error) => {
            eprintln!("adit: cannot start: no threads: {error}");
            return ExitCode::from(NOT_STARTED);
        }
    };
    let ended = office.block_on(node::run(settings, cores));
    // Blocking reads (a store on a hung disk) must not keep the process alive.
    for runtime in runtimes.into_iter().chain([office]) {
        runtime.shutdown_background();
    }
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let (what, code) = if failure.at_start() { ("cannot start", NOT_STARTED) } else { ("failed", FAILED) };
            eprintln!("adit: {what}: {failure}");
            ExitCode::from(code)
        }
    }
}

/// Every mistake of a file in lines: where, what, how to mend it.
fn tell(mistakes: &[Mistake], file: Option<&Path>) -> String {
    let name = file.map_or("settings".into(), |f| f.display().to_string());
    let count = mistakes.len();
    let mut out = format!("{name}: {count} mistake{}\n", if count == 1 { "" } else { "s" });
    for Mistake { at, problem, fix } in mistakes {
        out.push_str(&format!("  {at}: {problem}\n      fix: {fix}\n"));
    }
    out
}

/// The log goes to standard error; standard output is for what an owner copies.
fn log_to_stderr(settings: &LogSettings) {
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = match settings.format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(layer.with_filter(settings.level.0.clone())).init();
}
