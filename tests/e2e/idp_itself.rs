//! The providers and the browsers of tests against themselves: a fake that takes
//! everything, or a browser that sends too much, would make every scenario of
//! logins worthless.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::*;
use crate::idp::*;

const CALLBACK: &str = "https://auth.edge.localhost:8443/.adit/cb/test";
const SCOPE: &str = "openid email";

/// What a provider's discovery tells.
async fn discovered(issuer: &str) -> Value {
    let mut program = Browser::of_addresses();
    program.manner = Manner::Bare;
    let told = program.get(&format!("{issuer}/.well-known/openid-configuration")).await;
    assert_eq!(told.status, 200, "{}", told.text());
    assert_eq!(told.json()["issuer"], issuer);
    told.json()
}

fn endpoint(discovery: &Value, name: &str) -> String {
    discovery[name].as_str().unwrap_or_else(|| panic!("no {name}: {discovery}")).to_owned()
}

/// A whole login of this name: the token endpoint's answer.
async fn login(op: &OidcProvider, browser: &mut Browser, name: &str) -> (Login, String, u16, Value) {
    let told = discovered(&op.issuer).await;
    let login = Login::new();
    let url = login.url(&endpoint(&told, "authorization_endpoint"), &op.client_id, CALLBACK, SCOPE);
    let left = browser.login_at_op(&url, name).await;
    assert_eq!(left.location().unwrap().field("iss").as_ref(), Some(&op.issuer));
    let code = login.code(&left, CALLBACK);
    let client = (op.client_id.as_str(), op.client_secret.as_str());
    let (status, tokens) = login.redeem(&endpoint(&told, "token_endpoint"), client, &code, CALLBACK).await;
    (login, code, status, tokens)
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_oidc_provider_logs_in_and_redeems_a_code_once() {
    if !node_is_new_enough() {
        return;
    }
    let op = OidcProvider::start(&[CALLBACK], OidcOpts::default()).await;
    let mut browser = Browser::of_addresses();
    let (begun, code, status, tokens) = login(&op, &mut browser, "alice@example.com").await;
    assert_eq!(status, 200, "{tokens}");
    let (header, claims) = claims_of(&tokens["id_token"]);
    assert_eq!(header["alg"], "RS256");
    assert_eq!(claims["nonce"], begun.nonce);
    assert_eq!((&claims["aud"], &claims["sub"]), (&json!("adit"), &json!("alice@example.com")));
    assert_eq!((&claims["email"], &claims["email_verified"]), (&json!("alice@example.com"), &json!(true)));
    let token = format!("{}/token", op.issuer);
    let client = (op.client_id.as_str(), op.client_secret.as_str());
    let (status, again) = begun.redeem(&token, client, &code, CALLBACK).await;
    assert_eq!((status, &again["error"]), (400, &json!("invalid_grant")));
    // And takes the replayed code's token with it.
    let bearer = format!("Bearer {}", tokens["access_token"].as_str().unwrap());
    let me = browser.request("GET", &format!("{}/me", op.issuer), &[("authorization", &bearer)], b"").await;
    assert_eq!(me.status, 401, "{}", me.text());

    // The grant is gone and asked for anew; with it no page asks again. Another redirect URI, no PKCE: refused.
    let second = Login::new();
    let url = second.url(&format!("{}/auth", op.issuer), &op.client_id, CALLBACK, SCOPE);
    second.code(&browser.login_at_op(&url, "alice@example.com").await, CALLBACK);
    second.code(&browser.get(&url).await, CALLBACK);
    let wrong = second.url(&format!("{}/auth", op.issuer), &op.client_id, "https://evil.test/cb", SCOPE);
    assert_eq!(browser.get(&wrong).await.status, 400);
    let plain = url.split("&code_challenge").next().unwrap();
    let refused = browser.get(plain).await.location().unwrap();
    assert_eq!(refused.field("error").as_deref(), Some("invalid_request"));
    // A wrong secret, and a wrong verifier.
    let code = second.code(&browser.get(&url).await, CALLBACK);
    let (status, answer) = second.redeem(&token, (&op.client_id, "wrong"), &code, CALLBACK).await;
    assert_eq!((status, &answer["error"]), (401, &json!("invalid_client")));
    let (status, answer) = Login::new().redeem(&token, client, &code, CALLBACK).await;
    assert_eq!((status, &answer["error"]), (400, &json!("invalid_grant")));
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_oidc_provider_tells_of_an_address_what_its_login_says() {
    if !node_is_new_enough() {
        return;
    }
    let opts = OidcOpts { alg: Some("ES256".into()), ..OidcOpts::default() };
    let op = OidcProvider::start(&[CALLBACK], opts).await;
    for (name, email, verified) in [
        ("unverified:a@b.c", json!("a@b.c"), json!(false)),
        ("absent:a@b.c", json!("a@b.c"), Value::Null),
        ("string:a@b.c", json!("a@b.c"), json!("true")),
        ("noemail:nobody", Value::Null, Value::Null),
    ] {
        let (_, _, status, tokens) = login(&op, &mut Browser::of_addresses(), name).await;
        assert_eq!(status, 200, "{tokens}");
        let (header, claims) = claims_of(&tokens["id_token"]);
        assert_eq!((&header["alg"], &claims["sub"]), (&json!("ES256"), &json!(name)));
        assert_eq!((&claims["email"], &claims["email_verified"]), (&email, &verified), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_oidc_provider_changes_keys_goes_down_and_comes_up_where_it_was() {
    if !node_is_new_enough() {
        return;
    }
    let mut op = OidcProvider::start(&[CALLBACK], OidcOpts::default()).await;
    let mut browser = Browser::of_addresses();
    let (_, _, _, tokens) = login(&op, &mut browser, "alice@example.com").await;
    let before = claims_of(&tokens["id_token"]).0["kid"].clone();
    op.rotate_keys().await;
    let (_, _, status, tokens) = login(&op, &mut browser, "alice@example.com").await;
    assert_eq!(status, 200, "{tokens}");
    let after = claims_of(&tokens["id_token"]).0["kid"].clone();
    assert_ne!(before, after);
    let keys = browser.get(&format!("{}/jwks", op.issuer)).await.text();
    assert!(keys.contains(after.as_str().unwrap()) && !keys.contains(before.as_str().unwrap()), "{keys}");
    let jwks = format!("{}/jwks", op.issuer);
    op.hang();
    let answered = tokio::time::timeout(Duration::from_millis(300), browser.get(&jwks)).await;
    assert!(answered.is_err());
    op.go_on();
    op.down().await;
    assert!(browser.try_request("GET", &jwks, &[], b"").await.is_err());
    op.up().await;
    let asked = op.asked("/jwks").await;
    assert_eq!(browser.get(&jwks).await.text(), keys);
    assert_eq!(op.asked("/jwks").await, asked + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_oidc_provider_tells_a_logout_by_the_back_channel() {
    if !node_is_new_enough() {
        return;
    }
    let origin = Origin::https("told.edge.localhost").await;
    let heard = format!("https://told.edge.localhost:{}/sink", origin.addr.port());
    let opts = OidcOpts {
        backchannel_logout_uri: Some(heard.clone()),
        backchannel_via: Some(origin.addr.ip()),
        backchannel_ca: origin.certificate.clone(),
        post_logout_redirect_uris: vec!["https://web.edge.localhost/bye".into()],
        ..OidcOpts::default()
    };
    let mut op = OidcProvider::start(&[CALLBACK], opts).await;
    let mut browser = Browser::of_addresses();
    let (_, _, _, tokens) = login(&op, &mut browser, "alice@example.com").await;
    let id_token = claims_of(&tokens["id_token"]).1;
    assert!(op.logout(&mut browser).await.location().is_some());
    let told = eventually("the logout", async || op.told().await.first().cloned()).await;
    assert_eq!((&told["url"], &told["status"]), (&json!(heard), &json!(200)), "{told}");
    let body = told["body"].as_str().unwrap().strip_prefix("logout_token=").unwrap();
    let (header, claims) = claims_of(&json!(body));
    assert_eq!(header["typ"], "logout+jwt");
    assert_eq!((&claims["sub"], &claims["sid"], &claims["aud"]), (&id_token["sub"], &id_token["sid"], &json!("adit")));
    assert!(claims["sid"].is_string() && claims["events"].is_object() && claims["nonce"].is_null(), "{claims}");

    // By the relying party: back to where it registered.
    let (_, _, _, tokens) = login(&op, &mut browser, "alice@example.com").await;
    let hint = tokens["id_token"].as_str().unwrap();
    let fields =
        [("id_token_hint", hint), ("post_logout_redirect_uri", "https://web.edge.localhost/bye"), ("state", "s")];
    let page = browser.get(&format!("{}/session/end?{}", op.issuer, url::form(&fields))).await;
    let left = browser.submit(&page, &page.form().with("logout", "yes")).await;
    assert_eq!(left.location().unwrap().to_string(), "https://web.edge.localhost/bye?state=s");
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_glewlwyd_logs_in_and_says_nothing_of_a_verified_address() {
    let op = Glewlwyd::start(CALLBACK).await;
    let told = discovered(&op.issuer).await;
    let login = Login::new();
    let url = login.url(&endpoint(&told, "authorization_endpoint"), &op.client_id, CALLBACK, SCOPE);
    let mut browser = Browser::of_addresses();
    let left = browser.login_at_glewlwyd(&url, op.user.0, op.user.1).await;
    assert!(left.location().unwrap().field("iss").is_none());
    let code = login.code(&left, CALLBACK);
    let token = endpoint(&told, "token_endpoint");
    let client = (op.client_id.as_str(), op.client_secret.as_str());
    let (status, _) = login.redeem(&token, (client.0, "wrong"), &code, CALLBACK).await;
    assert!((400..500).contains(&status));
    let (status, tokens) = login.redeem(&token, client, &code, CALLBACK).await;
    assert_eq!(status, 200, "{tokens}");
    let (_, claims) = claims_of(&tokens["id_token"]);
    assert_eq!((&claims["iss"], &claims["aud"], &claims["azp"]), (&json!(op.issuer), &json!("adit"), &json!("adit")));
    assert_eq!((&claims["email"], &claims["nonce"]), (&json!(op.user.2), &json!(login.nonce)));
    assert!(claims.get("email_verified").is_none() && claims["sub"] != op.user.0, "{claims}");
    let (status, again) = login.redeem(&token, client, &code, CALLBACK).await;
    assert!((400..500).contains(&status), "{status} {again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_saml_is_a_provider_like_others_behind_its_broker() {
    let op = SamlBroker::start(&[CALLBACK]).await;
    let told = discovered(&op.issuer).await;
    let login = Login::new();
    let url = login.url(&endpoint(&told, "authorization_endpoint"), &op.client_id, CALLBACK, SCOPE);
    let mut browser = Browser::of_addresses();
    let left = browser.login_at_saml(&url).await;
    assert!(left.location().unwrap().field("iss").is_none());
    let code = login.code(&left, CALLBACK);
    let token = endpoint(&told, "token_endpoint");
    let client = (op.client_id.as_str(), op.client_secret.as_str());
    let (status, _) = login.redeem(&token, (client.0, "wrong"), &code, CALLBACK).await;
    assert_eq!(status, 401);
    let (status, tokens) = login.redeem(&token, client, &code, CALLBACK).await;
    assert_eq!(status, 200, "{tokens}");
    let (_, claims) = claims_of(&tokens["id_token"]);
    assert_eq!((&claims["iss"], &claims["aud"]), (&json!(op.issuer), &json!(["adit"])));
    assert_eq!((&claims["email"], &claims["nonce"]), (&json!(op.email), &json!(login.nonce)));
    assert!(claims.get("email_verified").is_none(), "{claims}");
    let (status, again) = login.redeem(&token, client, &code, CALLBACK).await;
    assert_eq!((status, &again["error"]), (400, &json!("invalid_grant")));
    // It tells of no PKCE, and checks it all the same.
    let code = login.code(&browser.login_at_saml(&url).await, CALLBACK);
    let (status, refused) = Login::new().redeem(&token, client, &code, CALLBACK).await;
    assert_eq!((status, &refused["error"]), (400, &json!("invalid_request")));
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_mock_forges_what_it_is_told_to_and_remembers_what_it_was_asked() {
    if !node_is_new_enough() {
        return;
    }
    let mut op = MockProvider::start().await;
    let told = discovered(&op.issuer).await;
    let token = endpoint(&told, "token_endpoint");
    let client = (op.client_id.clone(), op.client_secret.clone());
    let authorize = format!("{}/authorize", op.issuer);
    let redeemed = async || {
        let login = Login::new();
        let url = login.url(&authorize, &client.0, CALLBACK, SCOPE);
        let code = login.code(&Browser::of_addresses().get(&url).await, CALLBACK);
        let (status, tokens) = login.redeem(&token, (&client.0, &client.1), &code, CALLBACK).await;
        assert_eq!(status, 200, "{tokens}");
        (login, code, tokens)
    };
    let (login, _, honest) = redeemed().await;
    let (header, claims) = claims_of(&honest["id_token"]);
    assert_eq!((&claims["nonce"], &claims["aud"]), (&json!(login.nonce), &json!("adit")));
    assert_eq!((&claims["email"], &claims["email_verified"]), (&json!("alice@example.com"), &json!(true)));

    let mut seen = std::collections::BTreeSet::new();
    let modes = "aud multiaud noaud iss noiss exp noexp future nbf old nonce nononce azp nosub kid nokid typ crit \
                 unverified absent string noemail algnone hs256secret hs256public badsig wrongkey jwk nosig";
    for mode in modes.split_whitespace() {
        op.mode(mode).await;
        let (login, _, tokens) = redeemed().await;
        let whole = tokens["id_token"].as_str().unwrap();
        let (forged_header, mut forged) = claims_of(&tokens["id_token"]);
        // Less what every login has of its own.
        for (name, own) in [("nonce", json!(login.nonce)), ("iat", claims["iat"].clone())] {
            if forged[name] == own || (name == "iat" && !matches!(mode, "future" | "old")) {
                forged[name] = Value::Null;
            }
        }
        for name in ["exp", "nbf"] {
            let off = forged[name].as_i64().zip(claims[name].as_i64()).map(|(a, b)| (a - b) / 1000);
            forged[name] = json!(off);
        }
        let signature = whole.rsplit('.').next().unwrap().len();
        let checks = verified(&op, whole).await;
        let unlike = (forged_header != header, forged.to_string(), signature, checks);
        if matches!(mode, "badsig" | "wrongkey" | "jwk" | "nosig" | "algnone" | "hs256secret" | "hs256public" | "kid") {
            assert!(!checks, "{mode}: {whole}");
        } else {
            assert!(checks, "{mode}: {whole}");
        }
        assert!(seen.insert((mode, unlike)), "{mode}");
    }
    // Not two of the claims' are alike.
    let forged: Vec<_> = seen.iter().map(|(_, (_, claims, ..))| claims.as_str()).collect();
    let distinct: std::collections::BTreeSet<_> = forged.iter().collect();
    let alike =
        ["kid", "nokid", "typ", "crit", "algnone", "hs256secret", "hs256public", "badsig", "wrongkey", "jwk", "nosig"];
    assert_eq!(distinct.len(), forged.len() - alike.len() + 1, "{forged:#?}");

    op.mode("ok").await;
    op.set_claims(json!({"email": "\u{212a}arl@example.com", "name": null, "groups": ["x"]})).await;
    let before = op.asked("token").await.len();
    let (login, code, tokens) = redeemed().await;
    let (_, claims) = claims_of(&tokens["id_token"]);
    assert_eq!((&claims["email"], &claims["groups"]), (&json!("\u{212a}arl@example.com"), &json!(["x"])));
    let asked = op.asked("token").await;
    assert_eq!(asked.len(), before + 1);
    let last = asked.last().unwrap();
    assert_eq!((&last["form"]["code"], &last["form"]["code_verifier"]), (&json!(code), &json!(login.verifier)));
    assert!(last["headers"]["authorization"].as_str().unwrap().starts_with("Basic "), "{last}");
}

/// Whether a key that the mock tells made this signature with RS256; any of them
/// where the token names none.
async fn verified(op: &MockProvider, token: &str) -> bool {
    use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
    use data_encoding::BASE64URL_NOPAD;
    let keys = Browser::of_addresses().get(&format!("{}/jwks", op.issuer)).await.json();
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let (header, _) = claims_of(&json!(token));
    let signature = BASE64URL_NOPAD.decode(signature.as_bytes()).unwrap();
    let keys = keys["keys"].as_array().unwrap().iter();
    header["alg"] == "RS256"
        && keys.filter(|key| header["kid"].is_null() || header["kid"] == key["kid"]).any(|key| {
            let number = |name: &str| BASE64URL_NOPAD.decode(key[name].as_str().unwrap().as_bytes()).unwrap();
            let key = RsaPublicKeyComponents { n: number("n"), e: number("e") };
            key.verify(&RSA_PKCS1_2048_8192_SHA256, signed.as_bytes(), &signature).is_ok()
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_mock_fails_in_every_way_that_an_endpoint_can() {
    if !node_is_new_enough() {
        return;
    }
    let mut op = MockProvider::start().await;
    let mut browser = Browser::of_addresses();
    browser.manner = Manner::Bare;
    let paths = [("discovery", "/.well-known/openid-configuration"), ("jwks", "/jwks"), ("token", "/token")];
    for (endpoint, path) in paths {
        let url = format!("{}{path}", op.issuer);
        let method = if endpoint == "token" { "POST" } else { "GET" };
        let mut ask = async || browser.try_request(method, &url, &[], b"").await;
        op.mode(&format!("500_{endpoint}")).await;
        assert_eq!(ask().await.unwrap().status, 500);
        op.mode(&format!("redirect_{endpoint}")).await;
        assert_eq!(ask().await.unwrap().location().unwrap().path(), "/elsewhere");
        op.mode(&format!("huge_{endpoint}")).await;
        assert!(ask().await.unwrap().body.len() > 64 << 10);
        op.mode(&format!("html_{endpoint}")).await;
        assert_eq!(ask().await.unwrap().header("content-type"), "text/html");
        op.mode(&format!("garbage_{endpoint}")).await;
        assert!(ask().await.unwrap().json().is_null());
        op.mode(&format!("cut_{endpoint}")).await;
        assert!(ask().await.is_err());
        op.mode(&format!("slow_{endpoint}")).await;
        assert!(tokio::time::timeout(Duration::from_millis(300), ask()).await.is_err());
        assert_eq!(op.asked(endpoint).await.len(), 7);
    }
    op.mode("discovery").await;
    let told = browser.get(&format!("{}/.well-known/openid-configuration", op.issuer)).await.json();
    assert_ne!(told["issuer"], op.issuer);
    op.mode("ok").await;
    let old = browser.get(&format!("{}/jwks", op.issuer)).await.json();
    let kid = op.rotate_keys(true).await;
    let both = browser.get(&format!("{}/jwks", op.issuer)).await.json();
    assert_eq!((&both["keys"][0], &both["keys"][1]["kid"]), (&old["keys"][0], &json!(kid)));
    let kid = op.rotate_keys(false).await;
    let alone = browser.get(&format!("{}/jwks", op.issuer)).await.json();
    assert_eq!((alone["keys"].as_array().unwrap().len(), &alone["keys"][0]["kid"]), (1, &json!(kid)));
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_fake_github_asks_for_all_that_the_real_one_does() {
    let github = FakeGithub::start(CALLBACK).await;
    let mut browser = Browser::of_addresses();
    let login = Login::new();
    let authorize = format!("{}/login/oauth/authorize", github.url);
    let token = format!("{}/login/oauth/access_token", github.url);
    let url = login.url(&authorize, &github.client_id, CALLBACK, "user:email");
    let mut program = Browser::of_addresses();
    program.manner = Manner::Bare;
    let mut redeem = async |code: &str, secret: &str, verifier: &str| {
        let fields = [
            ("client_id", github.client_id.as_str()),
            ("client_secret", secret),
            ("code", code),
            ("redirect_uri", CALLBACK),
            ("code_verifier", verifier),
        ];
        let headers = [("accept", "application/json"), ("content-type", "application/x-www-form-urlencoded")];
        let answer = program.request("POST", &token, &headers, url::form(&fields).as_bytes()).await;
        assert_eq!(answer.status, 200);
        answer.json()
    };
    let code = login.code(&browser.get(&url).await, CALLBACK);
    assert_eq!(redeem(&code, "wrong", &login.verifier).await["error"], "incorrect_client_credentials");
    let tokens = redeem(&code, &github.client_secret, &login.verifier).await;
    assert_eq!((&tokens["token_type"], &tokens["scope"]), (&json!("bearer"), &json!("user:email")));
    assert_eq!(redeem(&code, &github.client_secret, &login.verifier).await["error"], "bad_verification_code");
    let code = login.code(&browser.get(&url).await, CALLBACK);
    assert_eq!(redeem(&code, &github.client_secret, "wrong").await["error"], "bad_verification_code");

    let bearer = format!("Bearer {}", tokens["access_token"].as_str().unwrap());
    let user = format!("{}/user", github.url);
    let mut program = Browser::of_addresses();
    program.manner = Manner::Bare;
    let mut api = async |path: &str, agent: &[(&str, &str)]| {
        let headers = [&[("authorization", bearer.as_str())], agent].concat();
        let answer = program.request("GET", &format!("{user}{path}"), &headers, b"").await;
        (answer.status, answer.json())
    };
    let agent = [("user-agent", "adit")];
    assert_eq!(api("", &[]).await.0, 403);
    assert_eq!(api("", &agent).await.1["id"], 583_231);
    github.set_user(7, "other");
    github.set_emails(&[("a@b.c", true, false), ("d@e.f", false, true)]);
    assert_eq!(api("", &agent).await.1["login"], "other");
    let emails = api("/emails", &agent).await.1;
    assert_eq!(
        (&emails[0]["email"], &emails[0]["verified"], &emails[1]["primary"]),
        (&json!("a@b.c"), &json!(false), &json!(false))
    );
    github.revoke_tokens();
    assert_eq!(api("/emails", &agent).await.0, 401);
    github.fails(Some(502));
    assert_eq!(api("", &agent).await.0, 502);
    github.fails(None);
    github.denies(true);
    assert_eq!(browser.get(&url).await.location().unwrap().field("error").as_deref(), Some("access_denied"));
    let evil = login.url(&authorize, &github.client_id, "https://evil.test/cb", "user:email");
    let told = browser.get(&evil).await.location().unwrap();
    assert_eq!(
        (told.host.as_str(), told.field("error").as_deref()),
        ("auth.edge.localhost", Some("redirect_uri_mismatch"))
    );
    assert_eq!(github.asked("/login/oauth/access_token").len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_fake_facebook_asks_for_the_proof_and_may_have_no_address() {
    let facebook = FakeFacebook::start(CALLBACK).await;
    let mut browser = Browser::of_addresses();
    let login = Login::new();
    let url = login.url(&format!("{}/v23.0/dialog/oauth", facebook.url), &facebook.client_id, CALLBACK, "email");
    let mut program = Browser::of_addresses();
    program.manner = Manner::Bare;
    let mut ask = async |path: &str, fields: &[(&str, &str)]| {
        let answer = program.get(&format!("{}{path}?{}", facebook.url, url::form(fields))).await;
        (answer.status, answer.json())
    };
    let code = login.code(&browser.get(&url).await, CALLBACK);
    let (id, secret) = (facebook.client_id.as_str(), facebook.client_secret.as_str());
    let fields = |secret, verifier| {
        let fixed = [("client_id", id), ("redirect_uri", CALLBACK), ("code", code.as_str())];
        [fixed.as_slice(), &[("client_secret", secret), ("code_verifier", verifier)]].concat()
    };
    let wrong = ask("/v23.0/oauth/access_token", &fields("wrong", &login.verifier)).await;
    assert_eq!((wrong.0, &wrong.1["error"]["code"]), (400, &json!(1)));
    let (_, tokens) = ask("/v23.0/oauth/access_token", &fields(secret, &login.verifier)).await;
    let token = tokens["access_token"].as_str().unwrap_or_else(|| panic!("{tokens}"));
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret.as_bytes());
    let proof = data_encoding::HEXLOWER.encode(aws_lc_rs::hmac::sign(&key, token.as_bytes()).as_ref());
    let me = |proof| [("fields", "id,name,email"), ("access_token", token), ("appsecret_proof", proof)];
    let (_, user) = ask("/v23.0/me", &me(&proof)).await;
    assert_eq!(user, json!({"id": "10220012345678901", "name": "Pat Tester", "email": "pat@example.com"}));
    assert_eq!(ask("/me", &me("00")).await.0, 400);
    facebook.set_user("7", None);
    assert_eq!(ask("/me", &me(&proof)).await.1, json!({"id": "7", "name": "Pat Tester"}));
    facebook.revoke_tokens();
    assert_eq!(ask("/me", &me(&proof)).await.1["error"]["code"], 190);
    facebook.denies(true);
    let denied = browser.get(&url).await.location().unwrap();
    assert_eq!(denied.field("error_reason").as_deref(), Some("user_denied"));
}

#[test]
fn idp_browser_keeps_and_sends_cookies_as_browsers_do() {
    let mut jar = Jar::default();
    let (secure, plain) = (Url::parse("https://a.edge.test/in/side"), Url::parse("http://a.edge.test/in/side"));
    let mut take = |url: &Url, line: &str| jar.take(url, line, Reach::SameSite);
    for wrong in [
        "__Host-a=1; Path=/",
        "__Host-a=1; Secure; Path=/in",
        "__Host-a=1; Secure",
        "__host-a=1; Path=/; Domain=a.edge.test; Secure",
        "__Secure-a=1; Path=/",
        "=__Host-a=1; Secure",
        "__Host-Http-a=1; Secure; Path=/",
        "a=1; Domain=b.edge.test",
        "a=1; Domain=test",
        "a=1; SameSite=None",
        "",
    ] {
        assert!(take(&secure, wrong).is_err(), "{wrong}");
    }
    assert!(take(&secure, &format!("a={}", "x".repeat(4096))).is_err());
    assert!(take(&plain, "a=1; Secure").is_err());
    take(&secure, "__Host-a=1; Secure; Path=/; HttpOnly; SameSite=Lax").unwrap();
    take(&secure, "strict=1; Secure; Path=/; SameSite=Strict").unwrap();
    take(&secure, "none=1; Secure; Path=/; SameSite=None; Domain=.edge.test").unwrap();
    take(&secure, "deep=1; Secure; SameSite=Lax").unwrap();
    take(&secure, "short=1; Max-Age=60; Path=/").unwrap();
    take(&secure, "dated=1; Expires=Wed, 27 Jan 2100 10:12:33 GMT; Path=/other").unwrap();
    take(&secure, "past=1; Expires=Thu, 01 Jan 1970 00:00:01 GMT; Path=/").unwrap();
    assert!(take(&plain, "strict=2; Path=/").is_err());
    let mut sent = |url: &str, reach| jar.header(&Url::parse(url), reach).unwrap_or_default();
    assert_eq!(sent("https://a.edge.test/in/x", Reach::SameSite), "deep=1; __Host-a=1; strict=1; none=1; short=1");
    assert_eq!(sent("https://a.edge.test/inside", Reach::SameSite), "__Host-a=1; strict=1; none=1; short=1");
    assert_eq!(sent("https://a.edge.test/", Reach::CrossNavigation), "__Host-a=1; none=1; short=1");
    // A cookie without SameSite goes with a POST while it is new.
    assert_eq!(sent("https://a.edge.test/", Reach::CrossPost), "none=1; short=1");
    assert_eq!(sent("https://a.edge.test/", Reach::CrossFetch), "none=1");
    assert_eq!(sent("https://b.edge.test/", Reach::SameSite), "none=1");
    assert_eq!(sent("http://a.edge.test/", Reach::SameSite), "short=1");
    assert_eq!(sent("https://x.a.edge.test/other", Reach::SameSite), "none=1");
    jar.ahead = Duration::from_secs(61);
    assert_eq!(jar.header(&Url::parse("http://a.edge.test/"), Reach::SameSite), None);
    jar.take(&secure, "none=; Max-Age=0; Domain=edge.test; Path=/", Reach::SameSite).unwrap();
    assert!(jar.get("b.edge.test", "none").is_none());

    // A tenant with a domain in common pushes others' out; with a public suffix none.
    let other = Url::parse("https://b.edge.test/");
    jar.public_suffixes = vec!["edge.test".into()];
    assert!(jar.take(&other, "a=1; Domain=edge.test", Reach::SameSite).is_err());
    jar.public_suffixes.clear();
    for n in 0..240 {
        jar.take(&other, &format!("n{n}=1; Secure; Domain=edge.test"), Reach::SameSite).unwrap();
    }
    assert!(jar.get("a.edge.test", "__Host-a").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_browser_sends_forms_and_headers_as_browsers_do() {
    let origin = Origin::http().await;
    let port = origin.addr.port();
    let to = origin.addr;
    let mut browser = Browser::new(b"", move |_, _, _| to);
    let url = |host: &str| format!("http://{host}.edge.localhost:{port}/headers");
    let typed = browser.get(&url("a")).await.text();
    assert!(typed.contains("sec-fetch-site: none") && typed.contains("sec-fetch-mode: navigate"), "{typed}");
    assert!(typed.contains("accept: text/html") && !typed.contains("referer"), "{typed}");
    let page = browser.get(&url("a")).await;
    for (host, site) in [("a", "same-origin"), ("b", "same-site")] {
        let clicked = browser.click(&page, &url(host)).await.text();
        assert!(clicked.contains(&format!("sec-fetch-site: {site}\n")), "{clicked}");
    }
    let other = browser.get(&format!("http://app.localhost:{port}/headers")).await;
    let clicked = browser.click(&other, &url("a")).await.text();
    assert!(clicked.contains("sec-fetch-site: cross-site\n"), "{clicked}");
    assert!(clicked.contains(&format!("referer: http://app.localhost:{port}/\n")), "{clicked}");
    let posted = browser.post_form(&url("a"), &[("x", "a b&c")]).await.text();
    assert!(posted.starts_with("POST") && posted.contains("sec-fetch-site: same-origin"), "{posted}");
    assert!(posted.contains(&format!("origin: http://a.edge.localhost:{port}\n")), "{posted}");
    // A page that tells nobody where it is does not tell its own server either.
    let mut silent = page.clone();
    silent.headers.insert("referrer-policy", "no-referrer".parse().unwrap());
    let form = Form { action: page.url.clone(), post: true, fields: vec![] };
    let posted = browser.submit(&silent, &form).await.text();
    assert!(posted.contains("origin: null\n") && !posted.contains("referer"), "{posted}");
    browser.manner = Manner::Fetch;
    browser.from = Some(page.url.clone());
    let fetched = browser.get(&url("a")).await.text();
    assert!(fetched.contains("sec-fetch-mode: cors") && fetched.contains("accept: */*"), "{fetched}");
    browser.manner = Manner::Bare;
    let bare = browser.get(&url("a")).await.text();
    assert_eq!(bare, format!("GET /headers\nhost: a.edge.localhost:{port}\n"));

    let html = "<form method=post action='/x?a=1&amp;b=2'><input type=hidden name=csrf value=\"&quot;&#x41;&lt;\">\
                <input name=who><input type=checkbox name=no><button name=go value=1>Go</button></form>";
    let mut page = page;
    page.body = html.into();
    let form = page.form().with("who", "me");
    assert_eq!(form.action.to_string(), format!("http://a.edge.localhost:{port}/x?a=1&b=2"));
    assert_eq!(form.fields, [("csrf".into(), "\"A<".into()), ("who".into(), "me".into())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_browser_goes_to_another_node_with_each_request() {
    let nodes = [Origin::http().await, Origin::http().await];
    let addrs: [SocketAddr; 2] = [nodes[0].addr, nodes[1].addr];
    let mut browser = Browser::new(b"", move |_, _, n| addrs[n % 2]);
    browser.jar.put("web.edge.localhost", "s", "1");
    let mut stolen = browser.clone();
    for _ in 0..4 {
        browser.get("http://web.edge.localhost/").await;
    }
    let asked = nodes.each_ref().map(|node| node.requests.load(std::sync::atomic::Ordering::Relaxed));
    assert_eq!(asked, [2, 2]);
    browser.jar.clear();
    assert!(browser.cookie("web.edge.localhost", "s").is_none());
    assert_eq!(stolen.cookie("web.edge.localhost", "s").unwrap().value, "1");
    stolen.get("http://web.edge.localhost/").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_browser_and_chromium_visit_a_node_with_its_own_certificate() {
    if !node_is_new_enough() {
        return;
    }
    let node = Node::start().await;
    let origin = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    let port = node.addr("https").port();
    let base = format!("https://web.edge.localhost:{port}");
    let mut browser = Browser::at(&node);
    assert_eq!(browser.get(&format!("{base}/")).await.text(), "hello from the origin\n");
    let upgraded = browser.follow(&format!("http://web.edge.localhost:{}/", node.addr("http").port()), 3).await;
    assert_eq!(upgraded.last().unwrap().status, 200);

    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("page.png");
    let cookie = json!({"name": "c", "value": "1", "url": base, "sameSite": "Lax"});
    let steps = json!([
        {"goto": format!("{base}/")},
        {"text": "body"},
        {"screenshot": picture},
        {"evaluate": "document.cookie = 'own=2; Secure; SameSite=Strict'; fetch('/headers').then(a => a.status)"},
        {"addCookies": [cookie]},
        {"cookies": 0},
        {"websocket": {"url": format!("wss://web.edge.localhost:{port}/ws"), "send": ["a", "ü"]}},
        {"as": "another"},
        {"cookies": 0},
        {"try": true, "goto": format!("https://nowhere.localhost:{port}/")},
    ]);
    let results = Chromium::at(&node).run(&steps).await;
    assert_eq!(results[0]["status"], 200);
    assert_eq!(results[1], "hello from the origin\n");
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG"));
    assert_eq!(results[3], 200);
    let names: Vec<_> = results[5].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["own", "c"]);
    assert_eq!(results[6], json!({"opened": true, "messages": ["a", "ü"], "closed": 1000}));
    assert_eq!(results[8], json!([]));
    assert!(results[9]["error"].as_str().unwrap().contains("ERR_CERT"), "{}", results[9]);
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_chromium_logs_in_at_oidc_provider_and_comes_back() {
    if !node_is_new_enough() {
        return;
    }
    let node = Node::start().await;
    let origin = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("auth:80:{}", origin.target())]).await;
    let callback = format!("https://auth.edge.localhost:{}/headers", node.addr("https").port());
    let op = OidcProvider::start(&[&callback], OidcOpts::default()).await;
    let url = Login::new().url(&format!("{}/auth", op.issuer), &op.client_id, &callback, SCOPE);
    let steps = json!([
        {"goto": url},
        {"fill": ["input[name=login]", "alice@example.com"]},
        {"fill": ["input[name=password]", "any"]},
        {"click": "button[type=submit]"},
        {"waitFor": "input[value=consent]"},
        {"click": "button[type=submit]"},
        {"waitForURL": "auth\\.edge\\.localhost"},
        {"text": "body"},
    ]);
    let results = Chromium::at(&node).run(&steps).await;
    let came = Url::parse(results[6].as_str().unwrap());
    assert!(came.field("code").is_some() && came.field("iss").as_ref() == Some(&op.issuer), "{came}");
    assert!(results[7].as_str().unwrap().contains("sec-fetch-site: cross-site"), "{}", results[7]);
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_browser_sends_what_chromium_sends() {
    if !node_is_new_enough() {
        return;
    }
    let origin = Origin::http().await;
    let (to, port) = (origin.addr, origin.addr.port());
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap().cert.pem()).unwrap();
    let chromium = Chromium::new(&ca, &[("*.localhost", "127.0.0.1")]);
    let url = |host: &str| format!("http://{host}:{port}/headers");
    let (a, b, app) = (url("a.edge.localhost"), url("b.edge.localhost"), url("app.localhost"));
    let add = |what: &str| json!({"evaluate": format!("document.body.insertAdjacentHTML('beforeend', `{what}`)")});
    let policy = "<meta name=referrer content=no-referrer>";
    let form =
        format!("<form method=post action={a}><input type=hidden name=x value=1><button id=go>go</button></form>");
    let link = format!("<a id=go href={a}>go</a>");
    let mut steps = vec![
        json!({"goto": a}),
        json!({"evaluate": "document.cookie = 'strict=1; SameSite=Strict'; document.cookie = 'lax=1; SameSite=Lax'"}),
        json!({"goto": a}),
        json!({"text": "body"}),
    ];
    let pages = [(&a, &link), (&b, &link), (&app, &link), (&a, &form), (&b, &form), (&app, &form)];
    let cases: Vec<_> = pages.iter().flat_map(|(page, how)| [(*page, *how, ""), (*page, *how, policy)]).collect();
    for (page, how, policy) in &cases {
        steps.extend([json!({"goto": page}), add(policy), add(how), json!({"click": "#go"})]);
        steps.extend([json!({"waitForURL": "a\\.edge"}), json!({"text": "body"})]);
    }
    let results = chromium.run(&json!(steps)).await;

    let mut browser = Browser::new(b"", move |_, _, _| to);
    browser.jar.take(&Url::parse(&a), "strict=1; SameSite=Strict; Path=/", Reach::SameSite).unwrap();
    browser.jar.take(&Url::parse(&a), "lax=1; SameSite=Lax; Path=/", Reach::SameSite).unwrap();
    let mut ours = vec![browser.get(&a).await.text()];
    for (page, how, policy) in &cases {
        let mut page = browser.get(page).await;
        if !policy.is_empty() {
            page.headers.insert("referrer-policy", "no-referrer".parse().unwrap());
        }
        page.body = (*how).clone().into();
        let answer = match page.forms().first() {
            Some(form) => browser.submit(&page, form).await,
            None => browser.click(&page, &a).await,
        };
        ours.push(answer.text());
    }
    let theirs = results.iter().skip(3).step_by(6).map(|text| text.as_str().unwrap());
    let told = |text: &str| {
        let names = [
            "cookie",
            "origin",
            "referer",
            "sec-fetch-dest",
            "sec-fetch-mode",
            "sec-fetch-site",
            "upgrade-insecure-requests",
        ];
        let mut lines: Vec<_> = text
            .lines()
            .filter(|line| names.iter().any(|name| line.split(": ").next() == Some(*name)))
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    let theirs: Vec<_> = theirs.collect();
    assert_eq!((theirs.len(), told(theirs[0])[0].as_str()), (13, "cookie: strict=1; lax=1"));
    for (n, (theirs, ours)) in theirs.into_iter().zip(&ours).enumerate() {
        assert_eq!(told(ours), told(theirs), "case {n}: {:?}", n.checked_sub(1).map(|n| &cases[n]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idp_browser_comes_back_from_a_provider_as_chromium_does() {
    if !node_is_new_enough() {
        return;
    }
    let origin = Origin::http().await;
    let (to, port) = (origin.addr, origin.addr.port());
    let callback = format!("http://a.edge.localhost:{port}/headers");
    let github = FakeGithub::start(&callback).await;
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap().cert.pem()).unwrap();
    let login = Login::new();
    let there = login.url(&format!("{}/login/oauth/authorize", github.url), &github.client_id, &callback, "user:email");
    let pages = [callback.clone(), format!("http://b.edge.localhost:{port}/headers"), format!("{}/user", github.url)];
    let link = format!("<a id=go href='{there}'>go</a>");
    let mut steps = vec![
        json!({"goto": callback}),
        json!({"evaluate": "document.cookie = 'strict=1; SameSite=Strict'; document.cookie = 'lax=1; SameSite=Lax'"}),
        json!({"goto": there}),
        json!({"text": "body"}),
    ];
    for page in &pages {
        let add = format!("document.body.insertAdjacentHTML('beforeend', `{link}`)");
        steps.extend([json!({"goto": page}), json!({"evaluate": add}), json!({"click": "#go"})]);
        steps.extend([json!({"waitForURL": "a\\.edge.*code="}), json!({"text": "body"})]);
    }
    let results = Chromium::new(&ca, &[("*.localhost", "127.0.0.1")]).run(&json!(steps)).await;
    let theirs: Vec<_> = results.iter().skip(3).step_by(5).map(|text| text.as_str().unwrap()).collect();

    let mut browser = Browser::new(b"", move |host, port, _| host.parse().map_or(to, |ip| SocketAddr::new(ip, port)));
    browser.jar.take(&Url::parse(&callback), "strict=1; SameSite=Strict; Path=/", Reach::SameSite).unwrap();
    browser.jar.take(&Url::parse(&callback), "lax=1; SameSite=Lax; Path=/", Reach::SameSite).unwrap();
    let mut ours = vec![browser.follow(&there, 3).await.pop().unwrap().text()];
    for page in &pages {
        let page = browser.get(page).await;
        let clicked = browser.click(&page, &there).await;
        ours.push(browser.follow_on(clicked, 3).await.pop().unwrap().text());
    }
    let told = |text: &str| {
        let names = ["cookie: ", "referer: ", "sec-fetch-site: ", "origin: "];
        let lines = text.lines().filter(|line| names.iter().any(|name| line.starts_with(name)));
        lines.map(str::to_owned).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(ours.len(), theirs.len());
    for (n, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        assert_eq!(told(ours), told(theirs), "case {n}");
    }
}
