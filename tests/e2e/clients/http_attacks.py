"""Requests that proxies and origins are known to read in different ways, and
floods of HTTP/2. The origin is here too, and knows what it must never see.

Prints the port that the origin listens on; a line `ADDRESS PORT` on standard
input names the edge's plain HTTP listener; each attack is then told by a line,
`ok NAME` or `wrong NAME: why`, and `done` ends.
"""

import re
import socket
import sys
import threading
import time

import hpack
from hyperframe import frame

HOST = "web.edge.localhost"
seen, lock = [], threading.Lock()


class Origin(threading.Thread):
    """Reads heads and bodies by RFC 9112, keeps connections, tells what it saw."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]

    def run(self):
        while True:
            tcp, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(tcp,), daemon=True).start()

    def serve(self, tcp):
        file = tcp.makefile("rb")
        try:
            while True:
                line = file.readline()
                if not line:
                    return
                head = {}
                while True:
                    field = file.readline()
                    if field in (b"\r\n", b"\n", b""):
                        break
                    name, _, value = field.partition(b":")
                    head.setdefault(name.strip().lower(), []).append(value.strip())
                body = b""
                if b"transfer-encoding" in head:
                    while True:
                        size = int(file.readline().split(b";")[0], 16)
                        chunk = file.read(size)
                        body += chunk
                        while file.readline() not in (b"\r\n", b""):
                            pass
                        if size == 0:
                            break
                elif b"content-length" in head:
                    body = file.read(int(head[b"content-length"][0]))
                with lock:
                    seen.append((line.decode("latin-1").strip(), head, body))
                tcp.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (OSError, ValueError):
            pass
        finally:
            tcp.close()


def connect():
    tcp = socket.create_connection(edge, timeout=10)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return tcp


def answers(data, wait=1.5):
    """What comes back for these bytes until the end, or until it is quiet."""
    with connect() as tcp:
        got = b""
        try:
            tcp.sendall(data)
            tcp.settimeout(wait)
            while True:
                piece = tcp.recv(65536)
                if not piece:
                    break
                got += piece
        except OSError:
            pass
        return got


def good():
    """An ordinary visitor is served, by a connection that is whole."""
    got = answers(f"GET /good HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode(), 10)
    if not got.startswith(b"HTTP/1.1 200") or not got.endswith(b"ok"):
        raise AssertionError(f"an ordinary visitor got {got[:200]!r}")


def clean(most=1):
    """Nothing smuggled came to the origin, and at most so many of an attack's own."""
    time.sleep(0.05)
    with lock:
        told = [line for line, _, _ in seen]
        seen.clear()
    bad = [line for line in told if "smuggled" in line or not re.match(r"^[A-Z]+ \S+ HTTP/1\.1$", line)]
    if bad:
        raise AssertionError(f"the origin saw {bad}")
    attacks = [line for line in told if "/good" not in line]
    if len(attacks) > most:
        raise AssertionError(f"the origin saw {attacks}")


SMUGGLED = f"GET /smuggled HTTP/1.1\r\nHost: {HOST}\r\nX: "


def h1_shapes():
    head = f"POST /outer HTTP/1.1\r\nHost: {HOST}\r\n"
    length = len(SMUGGLED)
    inner = f"0\r\n\r\n{SMUGGLED}"
    codings = [
        "Transfer-Encoding: chunked", "Transfer-Encoding : chunked", "Transfer-Encoding:\tchunked",
        "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: x", "Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding:\x0bchunked", "Transfer-Encoding:\x0cchunked", "Transfer-Encoding: \x00chunked",
        "Transfer-Encoding: chunked\x00", "Transfer-Encoding\x00: chunked", "X: y\rTransfer-Encoding: chunked",
        "X: y\nTransfer-Encoding: chunked", " Transfer-Encoding: chunked", "X: y\r\n Transfer-Encoding: chunked",
        "Transfer-Encoding:\r\n chunked", "Transfer-encoding: \"chunked\"", "Transfer-Encoding: chunk\r\ned",
        "Transfer_Encoding: chunked", "Transfer Encoding: chunked", "tRANSFER-ENCODING: CHUNKED",
        "Transfer-Encoding: chunked;q=1", "Transfer-Encoding: ,chunked", "Transfer-Encoding: chunked,",
        "Content-Encoding: chunked", "TE: chunked", "Transfer-Encoding: cow", "Transfer-Encoding: ch\u0199nked",
    ]
    for coding in codings:
        yield f"CL.TE {coding!r}", f"{head}Content-Length: {len(inner)}\r\n{coding}\r\n\r\n{inner}"
        yield f"TE.CL {coding!r}", f"{head}{coding}\r\nContent-Length: 4\r\n\r\n{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n"
    for lengths in ["5\r\nContent-Length: 0", "0\r\nContent-Length: 5", "5, 5", "5,0", "+5", "-1", "5 5", " 5\t", "0x5", "5;", "\x005",
                    "00000000000000000000005", "5\x0b", "", "5\r\nContent-Length : 0", "5\r\n Content-Length: 0", "1e1"]:
        yield f"CL.CL {lengths!r}", f"{head}Content-Length: {lengths}\r\n\r\nxxxxx{SMUGGLED}"
    chunks = [
        "3;\nabc\r\n0\r\n\r\n", "3\r\nabcX\r\n0\r\n\r\n", "3\rabc\r\n0\r\n\r\n", "3 \r\nabc\r\n0\r\n\r\n", "0x3\r\nabc\r\n0\r\n\r\n",
        "+3\r\nabc\r\n0\r\n\r\n", "3_0\r\nabc\r\n0\r\n\r\n", "\r\n3\r\nabc\r\n0\r\n\r\n", "3\r\nabc\n0\r\n\r\n", "3\r\nabc\r\n0\n\n",
        "3\r\nabc\r\n00000000000000000000\r\n\r\n", "3;a=\"\r\n\"\r\nabc\r\n0\r\n\r\n", "10000000000000003\r\nabc\r\n0\r\n\r\n",
        "3\r\nabc\r\n0\r\nX: y\nZ: a\r\n\r\n", "3\r\nabc\r\n0\r\nContent-Length: 9\r\n\r\n", "3\r\nabc\r\n0\r\n: y\r\n\r\n",
    ]
    for body in chunks:
        yield f"chunks {body!r}", f"{head}Transfer-Encoding: chunked\r\n\r\n{body}"
    # A body where none is expected, and a request hidden in what looks like one.
    for method in ["GET", "HEAD", "OPTIONS", "DELETE", "TRACE"]:
        yield f"CL.0 {method}", f"{method} /outer HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
    yield "upgrade", f"GET /outer HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
    yield "expect", f"POST /outer HTTP/1.1\r\nHost: {HOST}\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
    yield "expect nonsense", f"POST /outer HTTP/1.1\r\nHost: {HOST}\r\nExpect: x 100-continue\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
    yield "connection names a length", f"{head}Connection: Content-Length\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}"
    yield "connection names a coding", f"{head}Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n"


def h1():
    for name, data in h1_shapes():
        data = data.encode("utf-8")
        # An upload that waits for a 100 goes on after a second.
        answers(data, 1.5 if name.startswith("expect") else 0.2)
        # Whatever was made of it: what the next visitor gets is his own.
        good()
        try:
            clean(most=1)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


class H2:
    """A connection of raw frames."""

    def __init__(self):
        self.tcp = connect()
        self.encoder = hpack.Encoder()
        self.tcp.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame.SettingsFrame(0).serialize())

    def send(self, *frames):
        self.tcp.sendall(b"".join(f.serialize() for f in frames))

    def headers(self, stream, fields, flags=("END_HEADERS", "END_STREAM"), raw=False):
        if raw:
            block = b""
            for name, value in fields:
                # Literal without indexing, never a Huffman code: any byte goes.
                block += b"\x00" + self.text(name) + self.text(value)
        else:
            block = self.encoder.encode(fields)
        return frame.HeadersFrame(stream, data=block, flags=flags)

    @staticmethod
    def text(value):
        value = value.encode("latin-1")
        assert len(value) < 127
        return bytes([len(value)]) + value

    def ends(self, seconds):
        """Reads until the edge ends the connection: whether it did in time."""
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                self.tcp.settimeout(max(0.01, until - time.monotonic()))
                if not self.tcp.recv(65536):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def reads(self, seconds=0.3):
        got, until = b"", time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                self.tcp.settimeout(max(0.01, until - time.monotonic()))
                piece = self.tcp.recv(65536)
                if not piece:
                    break
                got += piece
        except OSError:
            pass
        return got

    def close(self):
        self.tcp.close()


def request(path="/outer", method="GET", more=()):
    return [(":method", method), (":scheme", "http"), (":path", path), (":authority", HOST), *more]


def h2_smuggling():
    """Content-Length and Transfer-Encoding that lie, line ends in names, values and paths."""
    hidden = SMUGGLED + "\r\n\r\n"
    shapes = [
        ("H2.CL 0", request(method="POST", more=[("content-length", "0")]), hidden.encode()),
        ("H2.CL short", request(method="POST", more=[("content-length", "5")]), hidden.encode()),
        ("H2.CL long", request(method="POST", more=[("content-length", "5000")]), b"x"),
        ("H2.TE", request(method="POST", more=[("transfer-encoding", "chunked")]), b"0\r\n\r\n" + hidden.encode()),
        ("line end in a value", request(method="POST", more=[("x", "y\r\ntransfer-encoding: chunked")]), b"0\r\n\r\n" + hidden.encode()),
        ("line end in a name", request(method="POST", more=[("x: y\r\ntransfer-encoding", "chunked")]), b"0\r\n\r\n" + hidden.encode()),
        ("line feed in a value", request(method="POST", more=[("x", "y\ncontent-length: 0")]), hidden.encode()),
        ("line end in :path", request(path="/outer HTTP/1.1\r\nx: y\r\n\r\nGET /smuggled"), b""),
        ("space in :path", request(path="/outer HTTP/1.1 /smuggled"), b""),
        ("line end in :method", request(method="GET /smuggled HTTP/1.1\r\nx: y"), b""),
        ("space in :method", request(method="GET /smuggled"), b""),
        ("line end in :authority", [(":method", "GET"), (":scheme", "http"), (":path", "/outer"), (":authority", HOST + "\r\nx: y")], b""),
        (":scheme with a target", [(":method", "GET"), (":scheme", "http://evil/?"), (":path", "/outer"), (":authority", HOST)], b""),
        ("connection in upper case", request(more=[("Connection", "x")]), b""),
        ("host beside", request(more=[("host", "evil.edge.localhost")]), b""),
        ("NUL in a value", request(more=[("x", "a\x00b")]), b""),
    ]
    for name, fields, body in shapes:
        h2 = H2()
        flags = ["END_HEADERS"] if body else ["END_HEADERS", "END_STREAM"]
        frames = [h2.headers(1, fields, flags, raw=True)]
        if body:
            frames.append(frame.DataFrame(1, data=body, flags=["END_STREAM"]))
        try:
            h2.send(*frames)
            h2.reads()
        except OSError:
            pass
        h2.close()
        good()
        try:
            clean(most=1)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def flood(name, step, seconds=20):
    """The edge ends a connection that does this without pause."""
    h2 = H2()
    until = time.monotonic() + seconds
    n = 0
    try:
        while time.monotonic() < until:
            step(h2, n)
            n += 1
            if n % 64 == 0:
                good_now()
    except OSError:
        return n
    finally:
        h2.close()
    raise AssertionError(f"{name}: the connection lives after {n} rounds")


last_good = 0.0


def good_now():
    global last_good
    if time.monotonic() - last_good > 0.5:
        good()
        last_good = time.monotonic()


def continuation_flood():
    def step(h2, n):
        if n == 0:
            h2.send(h2.headers(1, request(), flags=[]))
        h2.send(frame.ContinuationFrame(1, data=b"\x00" + H2.text(f"x-{n}") + H2.text("y" * 100)))
    flood("CONTINUATION", step)


def empty_continuation_flood():
    def step(h2, n):
        if n == 0:
            h2.send(h2.headers(1, request(), flags=[]))
        h2.send(frame.ContinuationFrame(1, data=b""))
    flood("empty CONTINUATION", step)


def rapid_reset():
    def step(h2, n):
        frames = []
        for k in range(32):
            stream = 1 + 2 * (32 * n + k)
            frames += [h2.headers(stream, request()), frame.RstStreamFrame(stream, error_code=8)]
        h2.send(*frames)
    flood("rapid reset", step)
    with lock:
        seen.clear()


def resets_provoked():
    """Streams that the edge itself has to reset (a window of more than 2^31)."""
    def step(h2, n):
        frames = []
        for k in range(16):
            stream = 1 + 2 * (16 * n + k)
            frames += [h2.headers(stream, request(method="POST"), flags=["END_HEADERS"]),
                       frame.WindowUpdateFrame(stream, window_increment=0x7FFFFFFF)]
        h2.send(*frames)
    flood("resets provoked", step)
    with lock:
        seen.clear()


def not_read(name, made):
    """Who makes the edge answer and never reads is let go, or held to a bound."""
    h2 = H2()
    h2.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    h2.tcp.settimeout(1)
    until = time.monotonic() + 4
    sent = 0
    try:
        while time.monotonic() < until:
            h2.send(*[made() for _ in range(64)])
            sent += 64
            good_now()
    except TimeoutError:
        pass  # The edge reads no more of it: bounded.
    except OSError:
        pass
    good()
    h2.close()


def settings_flood():
    not_read("SETTINGS", lambda: frame.SettingsFrame(0, settings={3: 100}))


def ping_flood():
    not_read("PING", lambda: frame.PingFrame(0, opaque_data=b"12345678"))


def priority_flood():
    not_read("PRIORITY", lambda: frame.PriorityFrame(1, depends_on=0, stream_weight=1))


def empty_data_flood():
    h2 = H2()
    h2.send(h2.headers(1, request(method="POST"), flags=["END_HEADERS"]))
    until = time.monotonic() + 3
    try:
        while time.monotonic() < until:
            h2.send(*[frame.DataFrame(1, data=b"") for _ in range(64)])
            good_now()
    except OSError:
        pass
    good()
    h2.close()
    with lock:
        seen.clear()


def zero_window():
    """A hundred streams whose answers nobody takes; another visitor is served."""
    h2 = H2()
    h2.send(frame.SettingsFrame(0, settings={4: 0}))
    h2.send(*[h2.headers(1 + 2 * n, request()) for n in range(100)])
    for _ in range(5):
        good()
    h2.close()
    with lock:
        seen.clear()


def hpack_bomb():
    """One large entry of the table, named again and again."""
    h2 = H2()
    # 0x7f 0x81 0x1e: a length of 127 + 1 + 30 * 128 = 3968; what follows are names of it.
    block = h2.encoder.encode(request()) + b"\x40\x01x\x7f\x81\x1e" + b"y" * 3968 + b"\xbe" * 12_000
    h2.send(frame.HeadersFrame(1, data=block[:16_000], flags=["END_STREAM", "END_HEADERS"]))
    h2.reads()
    good()
    h2.close()
    clean(most=0)


def many_fields():
    for count, size in [(5000, 10), (200, 10), (100, 1000)]:
        h2 = H2()
        block = h2.encoder.encode(request(more=[(f"x-{n}", "y" * size) for n in range(count)]))
        pieces = [block[at:at + 16_000] for at in range(0, len(block), 16_000)]
        frames = [frame.HeadersFrame(1, data=pieces[0], flags=["END_STREAM"] + (["END_HEADERS"] if len(pieces) == 1 else []))]
        for at, piece in enumerate(pieces[1:], 2):
            frames.append(frame.ContinuationFrame(1, data=piece, flags=["END_HEADERS"] if at == len(pieces) else []))
        try:
            h2.send(*frames)
            h2.reads()
        except OSError:
            pass
        h2.close()
        good()
        clean(most=0)


origin = Origin()
origin.start()
print(f"port {origin.port}", flush=True)
address, port = sys.stdin.readline().split()
edge = (address, int(port))
for attack in [h1, h2_smuggling, continuation_flood, empty_continuation_flood, rapid_reset, resets_provoked, settings_flood,
               ping_flood, priority_flood, empty_data_flood, zero_window, hpack_bomb, many_fields]:
    begun = time.monotonic()
    try:
        attack()
        print(f"ok {attack.__name__} {time.monotonic() - begun:.1f}s", flush=True)
    except Exception as error:
        print(f"wrong {attack.__name__}: {type(error).__name__} {error}", flush=True)
print("done", flush=True)
