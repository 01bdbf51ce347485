"""A page with a hundred assets, an event stream in lockstep, and a WebSocket echo.

Prints `port N`; serves HTTP/1.1 until its standard input ends.
"""

import base64
import hashlib
import http.server
import queue
import sys
import threading
import time
import urllib.parse

ASSETS = 100
heard = queue.Queue()
echoed = threading.Event()

PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>page</title></head><body>
<p id="said">waiting</p>
<script>
let loaded = 0, failed = 0;
const tell = () => {
  if (loaded + failed !== %d) return;
  const said = document.getElementById('said');
  said.textContent = 'loaded ' + loaded + ' failed ' + failed + ' over ' + [...new Set(
    performance.getEntriesByType('resource').map(e => e.nextHopProtocol))].join(' ');
  const messages = ['a', 'ü€😀', 'x'.repeat(100000)];
  const socket = new WebSocket(location.href.replace('http', 'ws') + 'echo');
  let right = 0;
  socket.onopen = () => messages.forEach(m => socket.send(m));
  socket.onmessage = e => {
    right += e.data === messages[right];
    if (right === messages.length) socket.close(1000, 'thanks');
  };
  socket.onclose = e => said.textContent += ' echoed ' + right + ' closed ' + e.code;
  // The page is not loaded, and so not told, before this has ended.
  document.body.append(Object.assign(new Image(), {src: '/echoed'}));
};
</script>
%s
</body></html>"""


def page():
    kinds = []
    for n in range(ASSETS):
        done = 'onload="loaded++;tell()" onerror="failed++;tell()"'
        if n % 3 == 0:
            kinds.append(f'<img src="/asset/{n}.svg" {done}>')
        elif n % 3 == 1:
            kinds.append(f'<script src="/asset/{n}.js" {done}></script>')
        else:
            kinds.append(f'<link rel="stylesheet" href="/asset/{n}.css" {done}>')
    return (PAGE % (ASSETS, "\n".join(kinds))).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def say(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path == "/":
            self.say("text/html", page())
        elif path.startswith("/asset/"):
            size = (hash(path) % 50) * 1000
            if path.endswith(".svg"):
                self.say("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"><!--%s--></svg>' % (b"x" * size))
            elif path.endswith(".js"):
                self.say("text/javascript", b"//" + b"x" * size)
            else:
                self.say("text/css", b"/*" + b"x" * size + b"*/")
        elif path == "/events":
            self.events()
        elif path == "/echo":
            self.echo()
        elif path == "/echoed":
            echoed.wait(10)
            # The close is on its way back.
            time.sleep(0.5)
            echoed.clear()
            self.say("text/plain", b"ok")
        elif path.startswith("/heard/"):
            heard.put(path)
            self.say("text/plain", b"ok")
        else:
            self.send_error(404)

    def echo(self):
        """A WebSocket that sends back what comes (RFC 6455)."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while head := self.rfile.read(2):
            length = head[1] & 0x7F
            more = self.rfile.read({126: 2, 127: 8}.get(length, 0))
            length = int.from_bytes(more, "big") if more else length
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            self.wfile.write(bytes([head[0], head[1] & 0x7F]) + more + data)
            if head[0] & 0xF == 8:
                echoed.set()
                return

    def events(self):
        """The next event is sent when the one before was heard."""
        count = int(urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("n", ["20"])[0])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for n in range(count):
            event = f"id: {n}\ndata: {n}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            while heard.get(timeout=10) != f"/heard/{n}":
                pass
        self.wfile.write(b"0\r\n\r\n")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


server = Server(("127.0.0.1", 0), Handler)
print(f"port {server.server_port}", flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
