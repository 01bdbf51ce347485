"""A page with a hundred assets, an event stream in lockstep, and a WebSocket echo.

Prints `port N`; serves HTTP/1.1 until its standard input ends.
"""

import http.server
import queue
import sys
import threading
import urllib.parse

ASSETS = 100
heard = queue.Queue()

PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>page</title></head><body>
<p id="said">waiting</p>
<script>
let loaded = 0, failed = 0;
const tell = () => {
  if (loaded + failed === %d)
    document.getElementById('said').textContent = 'loaded ' + loaded + ' failed ' + failed + ' over ' + [...new Set(
      performance.getEntriesByType('resource').map(e => e.nextHopProtocol))].join(' ');
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
        elif path.startswith("/heard/"):
            heard.put(path)
            self.say("text/plain", b"ok")
        else:
            self.send_error(404)

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
