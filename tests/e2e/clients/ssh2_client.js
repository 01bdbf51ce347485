// Registers a forward with npm's ssh2 and serves it: host port key name public target.
const fs = require('fs');
const net = require('net');
const { Client } = require('ssh2');

const [host, port, key, name, remote, target] = process.argv.slice(2);
const client = new Client();
const add = () =>
  client.forwardIn(name, Number(remote), (error) => {
    if (error) throw error;
    console.log('registered');
  });
client.on('ready', add);
// A line on standard input: cancel it, and add it again.
process.stdin.on('data', () =>
  client.unforwardIn(name, Number(remote), (error) => {
    if (error) throw error;
    console.log('cancelled');
    add();
  }),
);
client.on('tcp connection', (_info, accept) => {
  const channel = accept();
  const origin = net.connect({ host: '127.0.0.1', port: Number(target), allowHalfOpen: true });
  channel.pipe(origin);
  origin.pipe(channel);
  origin.on('error', () => channel.close());
  channel.on('error', () => origin.destroy());
});
client.on('error', (error) => {
  throw error;
});
client.connect({ host, port: Number(port), username: 'tester', privateKey: fs.readFileSync(key) });
