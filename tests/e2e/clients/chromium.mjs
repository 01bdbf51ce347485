// Debian's headless Chromium, led by a list of steps. Takes {rules, ca, args, steps} as
// JSON in its first argument; prints `step RESULT` for each, in JSON, then `done`.
// A step that fails ends the run, unless it has "try": its result is then {error}.
import { load } from './installed.mjs';

const { chromium } = (await load('playwright-core')).default;
const settings = JSON.parse(process.argv[2]);
const limit = settings.limit;

const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  // Root has no sandbox to run it in.
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-quic', '--disable-component-update',
    `--host-resolver-rules=${settings.rules.map(([name, to]) => `MAP ${name} ${to}`).join(', ')}`],
  timeout: limit,
});

// Users by name, each with cookies of its own.
const users = new Map();
let page;
const as = async name => {
  if (!users.has(name)) {
    const context = await browser.newContext();
    context.setDefaultTimeout(limit);
    users.set(name, await context.newPage());
  }
  page = users.get(name);
};
await as('');

const websocket = ({ url, protocols = [], send = [], count = send.length, ms = limit }) => new Promise(done => {
  const told = { opened: false, messages: [], closed: null };
  const socket = new WebSocket(url, protocols);
  const timer = setTimeout(() => done(told), ms);
  const end = () => { clearTimeout(timer); done(told); };
  socket.onopen = () => { told.opened = true; send.forEach(text => socket.send(text)); };
  socket.onmessage = event => {
    told.messages.push(event.data);
    if (count > 0 && told.messages.length === count) { socket.close(1000); }
  };
  socket.onclose = event => { told.closed = event.code; end(); };
});

const steps = {
  as,
  async goto(url) {
    const answer = await page.goto(url);
    return { status: answer?.status(), url: page.url(), headers: answer?.headers() };
  },
  fill: ([selector, text]) => page.fill(selector, text),
  click: selector => page.click(selector),
  async waitForURL(pattern) { await page.waitForURL(new RegExp(pattern)); return page.url(); },
  waitFor: selector => page.waitForSelector(selector, { state: 'attached' }).then(() => null),
  screenshot: path => page.screenshot({ path }).then(() => null),
  text: selector => page.textContent(selector),
  html: () => page.content(),
  url: () => page.url(),
  title: () => page.title(),
  back: () => page.goBack().then(() => page.url()),
  reload: () => page.reload().then(answer => answer?.status()),
  // An expression, or a function's text; what it promises is awaited.
  evaluate: script => page.evaluate(script),
  websocket: wanted => page.evaluate(websocket, { ms: limit, ...wanted }),
  cookies: () => page.context().cookies(),
  clearCookies: () => page.context().clearCookies(),
  addCookies: cookies => page.context().addCookies(cookies),
  // Headers of every request from here on.
  headers: headers => page.context().setExtraHTTPHeaders(headers),
};

let failed = false;
for (const { try: may, ...step } of settings.steps) {
  const [[name, value]] = Object.entries(step);
  let result;
  try {
    if (!steps[name]) throw new Error(`no step ${name}`);
    result = await steps[name](value) ?? null;
  } catch (why) {
    result = { error: why.message.split('\n')[0], at: page.url() };
    failed = !may;
  }
  console.log(`step ${JSON.stringify(result)}`);
  if (failed) break;
}
await browser.close();
console.log(failed ? 'failed' : 'done');
