//! Debian's glewlwyd: an OpenID provider of another make. Its ID tokens have an
//! opaque `sub`, `azp`, and no `email_verified`; its callback has no `iss`. It takes a
//! secret of Basic as it stands, without the form encoding of RFC 6749, 2.3.1.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::START;
use crate::harness::*;

const PORT: u16 = 4593;

pub struct Glewlwyd {
    pub issuer: String,
    pub client_id: String,
    pub client_secret: String,
    /// Its only user: name, password, e-mail.
    pub user: (&'static str, &'static str, &'static str),
    _program: Program,
    _dir: tempfile::TempDir,
}

impl Glewlwyd {
    /// One that knows a client with this redirect URI.
    pub async fn start(redirect_uri: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = own_address();
        let origin = format!("http://{host}:{PORT}");
        let store = dir.path().join("glewlwyd.db");
        let tables = std::fs::File::open("/usr/share/dbconfig-common/data/glewlwyd/install/sqlite3");
        run(Command::new("sqlite3").arg(&store).stdin(tables.expect("glewlwyd (Debian's package)"))).await;
        let key = dir.path().join("key.pem");
        run(Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048")).await;
        let public = run(Command::new("openssl").args(["rsa", "-pubout", "-in"]).arg(&key)).await;
        let private = std::fs::read_to_string(&key).unwrap();
        let settings = dir.path().join("glewlwyd.conf");
        std::fs::write(&settings, configuration(&host.to_string(), &origin, &store)).unwrap();
        let mut command = Command::new("glewlwyd");
        command.arg("--config-file").arg(&settings);
        let mut program = Program::start("glewlwyd", command);
        // What it says of its start comes before it listens.
        eventually_within(START, "glewlwyd's port", async || {
            assert!(program.runs(), "{}", program.output());
            tokio::net::TcpStream::connect((host, PORT)).await.ok()
        })
        .await;

        let user = ("alice", "alice's password", "alice@example.com");
        let (client_id, client_secret) = ("adit", "glewlwyds-secret-of-tests");
        let mut admin = Browser::of_addresses();
        admin.manner = Manner::Bare;
        let api = format!("{origin}/api");
        let mut put = async |path: &str, record: Value| {
            let kind = [("content-type", "application/json")];
            let done = admin.request("POST", &format!("{api}/{path}/"), &kind, record.to_string().as_bytes()).await;
            assert_eq!(done.status, 200, "glewlwyd's {path}: {}", done.text());
        };
        put("auth", json!({"username": "admin", "password": "password"})).await;
        let scope = json!({"name": "email", "display_name": "Email", "password_required": false, "scheme": {}});
        put("scope", scope).await;
        put(
            "user",
            json!({"username": user.0, "password": user.1, "email": user.2, "name": "Alice", "enabled": true,
                "scope": ["openid", "email", "g_profile"]}),
        )
        .await;
        put(
            "client",
            json!({"client_id": client_id, "name": "adit", "confidential": true, "enabled": true, "scope": [],
                "password": client_secret, "client_secret": client_secret, "redirect_uri": [redirect_uri],
                "authorization_type": ["code"],
                "token_endpoint_auth_method": ["client_secret_basic", "client_secret_post"]}),
        )
        .await;
        // The whole of it: one that is refused stays registered in part.
        put(
            "mod/plugin",
            json!({"module": "oidc", "name": "oidc", "display_name": "OIDC", "parameters": {
                "iss": format!("{origin}/api/oidc"), "jwt-type": "rsa", "jwt-key-size": "256",
                "key": private, "cert": public,
                "access-token-duration": 3600, "refresh-token-duration": 3600, "code-duration": 600,
                "refresh-token-rolling": true, "allow-non-oidc": false, "auth-type-code-enabled": true,
                "auth-type-code-revoke-replayed": true, "auth-type-token-enabled": false,
                "auth-type-id-token-enabled": true, "auth-type-password-enabled": false,
                "auth-type-client-enabled": false, "auth-type-device-enabled": false,
                "auth-type-refresh-enabled": true, "pkce-allowed": true, "pkce-method-plain-allowed": false,
                "jwks-show": true, "scope": [], "additional-parameters": [], "claims": [],
                "email-claim": "mandatory", "email-claim-scope": ["email"], "subject-type": "public",
                "restrict-scope-client-property": ""}}),
        )
        .await;
        Self {
            issuer: format!("{origin}/api/oidc"),
            client_id: client_id.into(),
            client_secret: client_secret.into(),
            user,
            _program: program,
            _dir: dir,
        }
    }
}

async fn run(command: &mut Command) -> String {
    let name = format!("{command:?}");
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
    let done = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let done = within(START, &name, done).await.unwrap();
    assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// As Debian's, less what it needs for pages of its own.
fn configuration(host: &str, origin: &str, store: &Path) -> String {
    let modules = "/usr/lib/glewlwyd";
    format!(
        r#"port={PORT}
bind_address="{host}"
external_url="{origin}"
login_url="login.html"
api_prefix="api"
static_files_path="/usr/share/glewlwyd/webapp"
log_mode="console"
log_level="INFO"
cookie_secure=0
session_expiration=2419200
session_key="GLEWLWYD2_SESSION_ID"
admin_session_authentication="cookie"
profile_session_authentication="cookie"
login_api_enabled=true
admin_scope="g_admin"
profile_scope="g_profile"
user_module_path="{modules}/user"
client_module_path="{modules}/client"
user_auth_scheme_module_path="{modules}/scheme"
plugin_module_path="{modules}/plugin"
use_secure_connection=false
secure_connection_key_file="none"
secure_connection_pem_file="none"
secure_connection_ca_file="none"
hash_algorithm="SHA512"
database = {{ type = "sqlite3"; path = "{}"; }};
static_files_mime_types = ( {{ extension = ".html"; mime_type = "text/html"; }} )
"#,
        store.display()
    )
}
