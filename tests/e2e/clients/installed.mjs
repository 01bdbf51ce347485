// Packages of target/npm, found through NODE_PATH (import alone never looks there).
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(import.meta.url);
export const load = name => import(pathToFileURL(require.resolve(name)));

/** Orders on standard input, a line of JSON each: {"n":1,"do":"name",...}; each is
 *  answered with the line `did 1 RESULT`, RESULT in JSON. Ends with its input. */
export const orders = known => {
  let rest = '';
  process.stdin.on('data', async bytes => {
    const lines = (rest + bytes).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      const order = JSON.parse(line);
      const result = await known[order.do](order);
      console.log(`did ${order.n} ${JSON.stringify(result ?? null)}`);
    }
  });
  process.stdin.on('end', () => process.exit(0));
};

/** Listens on an address, and a port that the system chose. */
export const listening = (server, host, port = 0) => new Promise((resolve, reject) => {
  server.once('error', reject).listen(port, host, () => resolve(server.address().port));
});
