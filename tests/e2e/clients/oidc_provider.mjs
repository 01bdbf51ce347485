// The certified OpenID provider with its development pages: any login with any
// password. Takes its settings as JSON in its first argument, prints `port N`.
import http from 'node:http';
import https from 'node:https';
import { listening, load, orders } from './installed.mjs';

const { Provider } = await load('oidc-provider');
const { exportJWK, generateKeyPair } = await load('jose');
const settings = JSON.parse(process.argv[2]);

let generation = 0;
const keys = async () => {
  generation++;
  const make = async alg => {
    const { privateKey } = await generateKeyPair(alg, { extractable: true });
    return { ...(await exportJWK(privateKey)), kid: `${alg}-${generation}`, alg, use: 'sig' };
  };
  return { keys: await Promise.all(['RS256', 'PS256', 'ES256', 'EdDSA'].map(make)) };
};

// Where a logout is told to: another address than the name's, and trust in one CA.
const told = [];
const tell = (url, options) => new Promise((resolve, reject) => {
  const to = new URL(url);
  const body = String(options.body ?? '');
  const headers = { ...Object.fromEntries(options.headers), 'content-length': Buffer.byteLength(body) };
  const via = settings.backchannel_via;
  const lookup = (_name, wanted, done) => (wanted.all ? done(null, [{ address: via, family: 4 }]) : done(null, via, 4));
  const ask = (to.protocol === 'https:' ? https : http).request(to, {
    method: options.method, headers, timeout: 10_000, ca: settings.backchannel_ca, agent: false,
    ...(via ? { lookup } : {}),
  }, answer => {
    answer.resume().on('end', () => {
      told.push({ url, body, status: answer.statusCode });
      resolve({ status: answer.statusCode, ok: answer.statusCode === 200, body: null });
    });
  });
  ask.on('timeout', () => ask.destroy(new Error('timeout'))).on('error', why => {
    told.push({ url, body, error: String(why) });
    reject(why);
  }).end(body);
});

const account = (_ctx, id) => ({
  accountId: id,
  claims() {
    const [, flag, email] = /^(unverified|absent|noemail|string):(.*)$/s.exec(id) ?? [id, 'verified', id];
    const verified = { verified: true, unverified: false, string: 'true' }[flag];
    return { sub: id, name: 'Tester', ...(flag === 'noemail' ? {} : { email, email_verified: verified }) };
  },
});

const make = async issuer => {
  const provider = new Provider(issuer, {
    clients: [{
      client_id: settings.client_id, client_secret: settings.client_secret,
      redirect_uris: settings.redirect_uris, post_logout_redirect_uris: settings.post_logout_redirect_uris,
      grant_types: ['authorization_code', 'refresh_token'], response_types: ['code'],
      token_endpoint_auth_method: settings.auth_method, id_token_signed_response_alg: settings.alg,
      ...(settings.backchannel_logout_uri
        ? { backchannel_logout_uri: settings.backchannel_logout_uri, backchannel_logout_session_required: true } : {}),
    }],
    jwks: await keys(),
    cookies: { keys: ['a key of tests'] },
    claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['name'] },
    conformIdTokenClaims: false,
    pkce: { required: () => true },
    features: {
      devInteractions: { enabled: true }, rpInitiatedLogout: { enabled: true }, revocation: { enabled: true },
      introspection: { enabled: true }, backchannelLogout: { enabled: true },
    },
    enabledJWA: { idTokenSigningAlgValues: ['RS256', 'PS256', 'ES256', 'EdDSA'] },
    findAccount: account,
    fetch: tell,
    ttl: { AuthorizationCode: 60, IdToken: 300, AccessToken: 300, Interaction: 600, Session: 3600, Grant: 3600 },
  });
  provider.on('server_error', (_ctx, why) => console.error('server_error', why));
  for (const event of ['authorization.error', 'grant.error', 'backchannel.error']) {
    provider.on(event, (_ctx, why) => console.error(event, why.message, why.error_description, why.error_detail));
  }
  return provider.callback();
};

let serve;
const asked = {};
const server = http.createServer((request, answer) => {
  const path = request.url.split('?')[0];
  asked[path] = (asked[path] ?? 0) + 1;
  serve(request, answer);
});
const port = await listening(server, settings.host);
const issuer = `http://${settings.host}:${port}`;
serve = await make(issuer);

orders({
  // What it stores is the module's own, and outlives the change of keys.
  async rotate() { serve = await make(issuer); return generation; },
  down() {
    server.closeAllConnections();
    return new Promise(done => server.close(() => done()));
  },
  up: () => listening(server, settings.host, port),
  told: () => told,
  asked: () => asked,
});
console.log(`port ${port}`);
