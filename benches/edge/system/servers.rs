//! How each system is set: as somebody would who wants it fast, and nothing that
//! another has not.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;

use super::{CONTROL, FORWARD, HTTPS, IP, SSH, keygen};
use crate::Outcome;
use crate::web::{DOMAIN, Tls};

/// It re-executes itself, and so wants to know where it is.
pub(super) const SSHD: &str = "/usr/sbin/sshd";
pub(super) const NGINX: &str = "/usr/sbin/nginx";
pub(super) const HAPROXY: &str = "/usr/sbin/haproxy";
pub(super) const ETCD: &str = "/usr/bin/etcd";

pub(super) fn lone_adit(binary: &Path, dir: &Path, tls: &Tls) -> Outcome<Command> {
    let (chain, key) = tls.write(dir)?;
    let more = format!(
        "[ingress]\nhttp = []\nhttps = [\"{HTTPS}\"]\nraw = [\"{IP}\"]\nconnections_per_address = 100000\n\
         [tls]\ndefault_certificate = {chain:?}\ndefault_key = {key:?}\n"
    );
    adit(binary, dir, "edge", IP, &more)
}

/// An adit at this address, where SSH clients and operators come by the usual ports.
pub(super) fn adit(binary: &Path, dir: &Path, name: &str, ip: IpAddr, more: &str) -> Outcome<Command> {
    let (ssh, control) = (SSH.port(), CONTROL.port());
    let settings = format!(
        "[node]\nname = \"{name}\"\ndomain = \"{DOMAIN}\"\nexempt_loopback = true\n\
         [log]\nlevel = \"warn\"\n\
         [ssh]\nlisten = [\"{ip}:{ssh}\"]\nmode = \"open\"\nsockets_per_key = 100000\n\
         [control]\nlisten = [\"{ip}:{control}\"]\nallow_anonymous_loopback = true\n{more}"
    );
    let config = dir.join(format!("{name}.toml"));
    std::fs::write(&config, settings)?;
    let mut command = Command::new(binary);
    command.arg("run").arg("--config").arg(config).arg("--state").arg(dir.join(name)).env_remove("ADIT_STATE");
    Ok(command)
}

/// Its defaults, but for the logs to owners, which nobody reads here, and limits that
/// would make it open new connections to the origin, or refuse visitors of one address.
pub(super) fn sandhole(binary: &Path, dir: &Path, tls: &Tls) -> Outcome<Command> {
    let folders = ["users", "admins", "certificates", "acme"].map(|name| dir.join(name));
    for folder in &folders {
        std::fs::create_dir(folder)?;
    }
    let [users, admins, certificates, acme] = folders;
    std::fs::copy(dir.join("key.pub"), users.join("key.pub"))?;
    let site = certificates.join("web");
    std::fs::create_dir(&site)?;
    let (chain, key) = tls.write(dir)?;
    std::fs::copy(chain, site.join("fullchain.pem"))?;
    std::fs::copy(key, site.join("privkey.pem"))?;
    let mut command = Command::new(binary);
    for (flag, folder) in [
        ("--user-keys-directory", users),
        ("--admin-keys-directory", admins),
        ("--certificates-directory", certificates),
        ("--acme-cache-directory", acme),
        ("--private-key-file", dir.join("host_key")),
    ] {
        command.arg(flag).arg(folder);
    }
    command.args(["--domain", DOMAIN, "--listen-address", &IP.to_string(), "--http-port", "8080"]);
    command.args(["--ssh-port", &SSH.port().to_string(), "--https-port", &HTTPS.port().to_string()]);
    command.args(["--allow-requested-subdomains", "--allow-requested-ports"]);
    command.args(["--disable-http-logs", "--disable-tcp-logs", "--max-simultaneous-connections-per-ip", "65535"]);
    command.args(["--http-pool-size", "1024", "--http-pool-max-reuse", "1000000000"]);
    command.env("RUST_LOG", "warn");
    Ok(command)
}

pub(super) fn sshd(dir: &Path) -> Outcome<Command> {
    let host_key = dir.join("host_key");
    keygen(&host_key)?;
    let settings = format!(
        "ListenAddress {SSH}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\n\
         PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         GatewayPorts clientspecified\nMaxStartups 1000\n",
        host_key.display(),
        dir.join("key.pub").display(),
    );
    let config = dir.join("sshd_config");
    std::fs::write(&config, settings)?;
    let mut command = Command::new(SSHD);
    command.args(["-D", "-e", "-f"]).arg(config);
    Ok(command)
}

/// Ends TLS, and keeps its connections through sshd's forward.
pub(super) fn nginx(dir: &Path, tls: &Tls) -> Outcome<Command> {
    let (chain, key) = tls.write(dir)?;
    let dir = dir.join("nginx");
    std::fs::create_dir(&dir)?;
    let mut text = format!(
        "daemon off;\nuser root;\nworker_processes auto;\nworker_rlimit_nofile 65536;\npid {0}/pid;\n\
         error_log stderr error;\nevents {{ worker_connections 32768; }}\nhttp {{\naccess_log off;\n",
        dir.display()
    );
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        let _ = writeln!(text, "{kind}_temp_path {}/{kind};", dir.display());
    }
    let _ = write!(
        text,
        "upstream sshd {{ server {FORWARD}; keepalive 1024; keepalive_requests 1000000000; }}\n\
         server {{ listen {HTTPS} ssl http2 backlog=4096; server_name web.{DOMAIN};\n\
         ssl_certificate {}; ssl_certificate_key {}; ssl_protocols TLSv1.2 TLSv1.3;\n\
         keepalive_requests 1000000000; keepalive_timeout 600s; client_max_body_size 0;\n\
         location / {{ proxy_pass http://sshd; proxy_http_version 1.1; proxy_set_header Connection \"\";\n\
         proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr;\n\
         proxy_set_header X-Forwarded-Proto $scheme;\n\
         proxy_request_buffering off; proxy_max_temp_file_size 0; proxy_buffers 16 32k; }} }}\n}}\n",
        chain.display(),
        key.display()
    );
    std::fs::write(dir.join("nginx.conf"), text)?;
    let mut command = Command::new(NGINX);
    command.arg("-c").arg(dir.join("nginx.conf")).arg("-p").arg(&dir);
    Ok(command)
}

/// From there to there, by splice, with pipes as large as adit's, or by copying. Not
/// splice-auto, which copies here.
pub(super) fn haproxy(dir: &Path, from: SocketAddr, to: SocketAddr, splice: bool) -> Outcome<Command> {
    let how = if splice { "option splice-request\n  option splice-response\n" } else { "" };
    let settings = format!(
        "global\n  maxconn 2000\n  nbthread 2\n  tune.pipesize 262144\n\
         defaults\n  mode tcp\n  {how}  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
         listen relay\n  bind {from}\n  server node {to}\n"
    );
    let config = dir.join("haproxy.cfg");
    std::fs::write(&config, settings)?;
    let mut command = Command::new(HAPROXY);
    command.args(["-db", "-f"]).arg(config);
    Ok(command)
}
