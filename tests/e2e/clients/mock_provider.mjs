// npm oauth2-mock-server, for what no honest provider says. Takes its settings as
// JSON in its first argument, prints `port N`.
import crypto from 'node:crypto';
import http from 'node:http';
import { listening, load, orders } from './installed.mjs';

const { OAuth2Server } = await load('oauth2-mock-server');
const settings = JSON.parse(process.argv[2]);

const mock = new OAuth2Server();
const key = () => ({ ...crypto.generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey.export({ format: 'jwk' }),
  alg: 'RS256', use: 'sig', kid: crypto.randomUUID() });
await mock.issuer.keys.add(key());
const other = key();

// The key that signs now; before a rotation is published, the mock's only one.
let signing = mock.issuer.keys.toJSON(true)[0];
let published = () => mock.issuer.keys.toJSON();

const base64 = text => Buffer.from(text).toString('base64url');
const sign = ({ header, payload }, how) => {
  const input = `${base64(JSON.stringify(header))}.${base64(JSON.stringify(payload))}`;
  return `${input}.${how(input).toString('base64url')}`;
};
const rsa = (jwk = signing) => input => crypto.sign('sha256', Buffer.from(input), { key: jwk, format: 'jwk' });
const hmac = secret => input => crypto.createHmac('sha256', secret).update(input).digest();
const publicPem = () => crypto.createPublicKey({ key: signing, format: 'jwk' }).export({ type: 'spki', format: 'pem' });

// What becomes of the ID token before it is signed.
const claims = {
  aud: t => { t.payload.aud = 'someone-else'; },
  multiaud: t => { t.payload.aud = [settings.client_id, 'evil']; },
  noaud: t => { delete t.payload.aud; },
  iss: t => { t.payload.iss = 'http://127.0.0.1:1'; },
  noiss: t => { delete t.payload.iss; },
  exp: t => { t.payload.exp = t.payload.iat - 3600; },
  noexp: t => { delete t.payload.exp; },
  future: t => { t.payload.iat += 86_400; t.payload.nbf = t.payload.iat; t.payload.exp += 172_800; },
  nbf: t => { t.payload.nbf = t.payload.iat + 86_400; },
  old: t => { t.payload.iat -= 86_400; },
  nonce: t => { t.payload.nonce = 'attacker'; },
  nononce: t => { delete t.payload.nonce; },
  azp: t => { t.payload.azp = 'evil'; },
  nosub: t => { delete t.payload.sub; },
  kid: t => { t.header.kid = 'nope'; },
  nokid: t => { delete t.header.kid; },
  typ: t => { t.header.typ = 'at+jwt'; },
  crit: t => { t.header.crit = ['x']; t.header.x = 1; },
  unverified: t => { t.payload.email_verified = false; },
  absent: t => { delete t.payload.email_verified; },
  string: t => { t.payload.email_verified = 'true'; },
  noemail: t => { delete t.payload.email; delete t.payload.email_verified; },
};
// And how it is signed.
const signatures = {
  algnone: t => sign({ ...t, header: { alg: 'none' } }, () => Buffer.alloc(0)),
  hs256secret: t => sign({ ...t, header: { ...t.header, alg: 'HS256' } }, hmac(settings.client_secret)),
  hs256public: t => sign({ ...t, header: { ...t.header, alg: 'HS256' } }, hmac(publicPem())),
  badsig: t => sign(t, input => { const s = rsa()(input); s[0] ^= 1; return s; }),
  wrongkey: t => sign(t, rsa(other)),
  // The key to check it with comes in the token itself.
  jwk: t => sign({ ...t, header: { ...t.header, kid: undefined,
    jwk: { kty: other.kty, n: other.n, e: other.e } } }, rsa(other)),
  nosig: t => sign(t, () => Buffer.alloc(0)),
  notjwt: () => 'no token at all',
};
const answers = {
  noidt: body => { delete body.id_token; },
  notype: body => { delete body.token_type; },
};
// What an endpoint does in place of answering: MODE_ENDPOINT, as in `slow_token`.
const transports = {
  slow: () => {},
  '500': (_request, answer) => answer.writeHead(500, { 'content-type': 'application/json' }).end('{"error":"server_error"}'),
  '400': (_request, answer) => answer.writeHead(400, { 'content-type': 'application/json' }).end('{"error":"invalid_grant"}'),
  redirect: (_request, answer) => answer.writeHead(302, { location: settings.elsewhere ?? `${mock.issuer.url}/elsewhere` }).end(),
  huge: (_request, answer) => answer.writeHead(200, { 'content-type': 'application/json' })
    .end(JSON.stringify({ filler: 'x'.repeat(1 << 20) })),
  html: (_request, answer) => answer.writeHead(200, { 'content-type': 'text/html' }).end('<p>no JSON</p>'),
  garbage: (_request, answer) => answer.writeHead(200, { 'content-type': 'application/json' }).end('{"cut":'),
  cut: (_request, answer) => {
    answer.writeHead(200, { 'content-type': 'application/json', 'content-length': 1000 }).write('{"cut":');
    answer.socket.end();
  },
};
const endpoints = { '/.well-known/openid-configuration': 'discovery', '/jwks': 'jwks', '/token': 'token',
  '/userinfo': 'userinfo', '/authorize': 'authorize', '/elsewhere': 'elsewhere' };

let mode = 'ok';
let own = {};
let idToken;
const asked = [];
mock.service.on('beforeTokenSigning', token => {
  if (!('aud' in token.payload)) return;
  // A copy: the mock's own signer would refuse some of it.
  idToken = { header: { typ: 'JWT', alg: 'RS256', kid: signing.kid },
    payload: { ...token.payload, email: 'alice@example.com', email_verified: true } };
  claims[mode]?.(idToken);
  for (const [name, value] of Object.entries(own)) {
    if (value === null) delete idToken.payload[name];
    else idToken.payload[name] = value;
  }
});
mock.service.on('beforeResponse', answer => {
  if (answer.body.id_token) answer.body.id_token = (signatures[mode] ?? (token => sign(token, rsa())))(idToken);
  answers[mode]?.(answer.body);
});
mock.service.on('beforeUserinfo', answer => {
  Object.assign(answer.body, { email: 'alice@example.com', email_verified: true }, own);
});
mock.service.on('beforeAuthorizeRedirect', redirect => {
  if (mode === 'authziss') redirect.url.searchParams.set('iss', 'http://127.0.0.1:1');
});

const server = http.createServer(async (request, answer) => {
  const endpoint = endpoints[request.url.split('?')[0]] ?? request.url;
  // A copy for the record; the mock reads the rest of the stream itself.
  const body = [];
  request.on('data', bytes => body.push(bytes));
  request.pause();
  const record = { endpoint, method: request.method, url: request.url, headers: request.headers, body: '', form: {} };
  asked.push(record);
  request.on('end', () => {
    record.body = Buffer.concat(body).toString();
    record.form = Object.fromEntries(new URLSearchParams(record.body));
  });
  const [how, where] = mode.split('_');
  if (transports[how] && where === endpoint) {
    request.resume();
    transports[how](request, answer);
  } else if (endpoint === 'discovery') {
    const issuer = mock.issuer.url;
    const told = { issuer: mode === 'discovery' ? 'http://127.0.0.1:1' : issuer, response_types_supported: ['code'],
      authorization_endpoint: `${issuer}/authorize`, token_endpoint: `${issuer}/token`, jwks_uri: `${issuer}/jwks`,
      userinfo_endpoint: `${issuer}/userinfo`, end_session_endpoint: `${issuer}/endsession`,
      subject_types_supported: ['public'], code_challenge_methods_supported: ['S256'],
      token_endpoint_auth_methods_supported: ['client_secret_basic', 'client_secret_post'],
      // As a provider that would take a forger's HS256 and none for good.
      id_token_signing_alg_values_supported: ['RS256', 'HS256', 'none'], scopes_supported: ['openid', 'email'] };
    request.resume();
    answer.writeHead(200, { 'content-type': 'application/json', ...(settings.cache_control
      ? { 'cache-control': settings.cache_control } : {}) }).end(JSON.stringify(told));
  } else if (endpoint === 'jwks') {
    request.resume();
    answer.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify({ keys: published() }));
  } else {
    request.resume();
    mock.service.requestHandler(request, answer);
  }
});
const port = await listening(server, settings.host);
mock.issuer.url = `http://${settings.host}:${port}`;

const forgeries = new Set(['ok', 'discovery', 'authziss', ...[claims, signatures, answers].flatMap(Object.keys)]);
orders({
  mode(order) {
    const [how, where] = order.mode.split('_');
    const known = forgeries.has(order.mode) || (transports[how] && Object.values(endpoints).includes(where));
    if (known) mode = order.mode;
    return Boolean(known);
  },
  claims(order) { own = order.claims; },
  // The key set as it was stays published beside the new key, or is gone.
  async rotate(order) {
    const before = order.keep ? published() : [];
    signing = key();
    await mock.issuer.keys.add(signing);
    const { kty, n, e, alg, use, kid } = signing;
    const now = [...before, { kty, n, e, alg, use, kid }];
    published = () => now;
    return kid;
  },
  asked: () => asked,
});
console.log(`port ${port}`);
