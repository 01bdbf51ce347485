"""Requests that proxies and origins are known to read in different ways, and
floods of HTTP/2. The origin is here too, and knows what it must never see.

Prints the port that the origin listens on; a line `ADDRESS PORT` on standard
input names the edge's plain HTTP listener; each attack is then told by a line,
`ok NAME` or `wrong NAME: why`, and `done` ends.
"""

import itertools
import re
import socket
import sys
import threading
import time

import hpack
from hyperframe import frame

HOST = "web.edge.localhost"
numbers = itertools.count()


class Unclear(Exception):
    """Something that the edge must not have passed on."""


class Cut(Exception):
    """The connection ended within a message, which so never became one."""


class Origin(threading.Thread):
    """Reads by RFC 9112 to the letter, keeps connections, and answers with the
    target, by which visitors know their own answer."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.lock = threading.Lock()
        self.seen, self.unclear = [], []

    def run(self):
        while True:
            tcp, _ = self.listener.accept()
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(tcp,), daemon=True).start()

    def serve(self, tcp):
        file = tcp.makefile("rb")
        try:
            while True:
                method, target, head = self.head(file)
                name, *options = target.split("?")
                # An origin that answers before it has the body, and has none then.
                body = None if "early" in options else self.body(head, file)
                with self.lock:
                    self.seen.append((name, method, head, body))
                misbehave = ANSWERS.get(options[0]) if options else None
                if misbehave:
                    misbehave(tcp)
                else:
                    content = target.encode()
                    length = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                    tcp.sendall(length + (b"" if method == "HEAD" else content))
        except Unclear as unclear:
            with self.lock:
                self.unclear.append(str(unclear))
        except (OSError, Cut):
            pass
        finally:
            tcp.close()

    @staticmethod
    def line(file):
        line = file.readline()
        if not line.endswith(b"\n"):
            raise Cut
        if not line.endswith(b"\r\n") or re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line[:-2]):
            raise Unclear(f"line {line!r}")
        return line[:-2]

    def fields(self, file):
        fields = {}
        while line := self.line(file):
            field = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*", line)
            if not field:
                raise Unclear(f"field {line!r}")
            fields.setdefault(field[1].lower(), []).append(field[2])
        return fields

    def head(self, file):
        line = self.line(file)
        request = re.fullmatch(rb"([A-Z]+) (/[^ \t#]*) HTTP/1\.1", line)
        if not request:
            raise Unclear(f"request line {line!r}")
        head = self.fields(file)
        lengths, codings = head.get(b"content-length", []), head.get(b"transfer-encoding", [])
        if len(lengths) + len(codings) > 1 or any(c != b"chunked" for c in codings):
            raise Unclear(f"framing {lengths} {codings}")
        if not all(re.fullmatch(rb"[0-9]+", length) for length in lengths) or len(head.get(b"host", [])) != 1:
            raise Unclear(f"head {head}")
        if b"upgrade" in head or b"smuggled" in line:
            raise Unclear(f"{line!r} {head}")
        return request[1].decode(), request[2].decode(), head

    def body(self, head, file):
        if b"transfer-encoding" in head:
            body = b""
            while True:
                size = self.line(file)
                if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
                    raise Unclear(f"chunk size {size!r}")
                if int(size, 16) == 0:
                    break
                body += self.bytes(file, int(size, 16))
                if self.line(file):
                    raise Unclear("chunk end")
            trailers = self.fields(file)
            if {b"content-length", b"transfer-encoding", b"host"} & trailers.keys():
                raise Unclear(f"trailers {trailers}")
            return body
        return self.bytes(file, int(head.get(b"content-length", [b"0"])[0]))

    @staticmethod
    def bytes(file, n):
        got = file.read(n)
        if len(got) < n:
            raise Cut
        return got


def connect():
    tcp = socket.create_connection(edge, timeout=10)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return tcp


def answers(data, wait=1.5):
    """What comes back for these bytes until the end, or until it is quiet; and
    whether it was the end."""
    got = b""
    with connect() as tcp:
        try:
            tcp.sendall(data)
            tcp.settimeout(wait)
            while piece := tcp.recv(65536):
                got += piece
        except TimeoutError:
            return got, False
        except OSError:
            pass
        return got, True


def good():
    """An ordinary visitor gets the answer that is his own."""
    target = f"/good/{next(numbers)}"
    got, _ = answers(f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode(), 10)
    if not got.startswith(b"HTTP/1.1 200") or not got.endswith(f"\r\n\r\n{target}".encode()):
        raise AssertionError(f"an ordinary visitor of {target} got {got[:500]!r}")


def seen(target):
    """What the origin took for requests with this target; all else that it saw is clear."""
    time.sleep(0.02)
    with origin.lock:
        if origin.unclear:
            unclear, origin.unclear = origin.unclear, []
            raise AssertionError(f"the origin saw {unclear}")
        return [request for request in origin.seen if request[0] == target]


def outcome(name, target, wanted, refused):
    """That the origin saw the one request that was wanted, or none where it had to be refused."""
    good()
    bodies = [body for _, _, _, body in seen(target)]
    if wanted is None and (bodies or not refused):
        raise AssertionError(f"{name}: not refused; the origin saw {bodies}")
    if wanted is not None and bodies != [wanted]:
        raise AssertionError(f"{name}: the origin saw {bodies}, not {wanted}")


SMUGGLED = f"GET /smuggled HTTP/1.1\r\nHost: {HOST}\r\nX: "
# No framing of ours: these are passed on as any field.
ORDINARY = ["Transfer_Encoding: chunked", "Content-Encoding: chunked", "TE: chunked", "X-Transfer-Encoding: chunked"]
CODINGS = [
    *ORDINARY,
    "Transfer-Encoding: chunked", "Transfer-Encoding : chunked", "Transfer-Encoding:\tchunked",
    "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: x", "Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding:\x0bchunked", "Transfer-Encoding:\x0cchunked", "Transfer-Encoding: \x00chunked",
    "Transfer-Encoding: chunked\x00", "Transfer-Encoding\x00: chunked", "X: y\rTransfer-Encoding: chunked",
    "X: y\nTransfer-Encoding: chunked", " Transfer-Encoding: chunked", "X: y\r\n Transfer-Encoding: chunked",
    "Transfer-Encoding:\r\n chunked", "Transfer-encoding: \"chunked\"", "Transfer-Encoding: chunk\r\ned",
    "Transfer Encoding: chunked", "tRANSFER-ENCODING: CHUNKED", "Transfer-Encoding: chunked;q=1",
    "Transfer-Encoding: ,chunked", "Transfer-Encoding: chunked,", "Transfer-Encoding: cow",
    "Transfer-Encoding: ch\u0199nked", "Transfer-Encoding:", "Transfer-Encoding: gzip", "\x00Transfer-Encoding: chunked",
]
LENGTHS = {
    " 5\t": b"xxxxx", "0005": b"xxxxx",
    **dict.fromkeys(["5\r\nContent-Length: 0", "0\r\nContent-Length: 5", "5\r\nContent-Length: 5", "5, 5", "5,0", "+5", "-1", "5 5", "0x5",
                     "5;", "\x005", "00000000000000000000005", "5\x0b", "", "5\r\nContent-Length : 0", "5\r\n Content-Length: 0", "1e1",
                     "5\rContent-Length: 0", "5\nContent-Length: 0", "18446744073709551621", "\u0665"]),
}
CHUNKS = {
    "3\r\nabc\r\n0\r\n\r\n": b"abc", "3;a=b;c=\"d\"\r\nabc\r\n0;e\r\nX: y\r\n\r\n": b"abc", "3 ;a\r\nabc\r\n0\r\n\r\n": b"abc",
    "003\r\nabc\r\n000\r\n\r\n": b"abc", "3 \r\nabc\r\n0\r\n\r\n": b"abc",
    **dict.fromkeys([
        "3;\nabc\r\n0\r\n\r\n", "3;a\nabc\r\n0\r\n\r\n", "3;a\rb\r\nabc\r\n0\r\n\r\n", "3;a\x00\r\nabc\r\n0\r\n\r\n", "3\r\nabcX\r\n0\r\n\r\n",
        "3\rabc\r\n0\r\n\r\n", "3\nabc\r\n0\r\n\r\n", "0x3\r\nabc\r\n0\r\n\r\n", "+3\r\nabc\r\n0\r\n\r\n", "-3\r\nabc\r\n0\r\n\r\n",
        "3_0\r\nabc\r\n0\r\n\r\n", " 3\r\nabc\r\n0\r\n\r\n", "3 3\r\nabc\r\n0\r\n\r\n", "\r\n3\r\nabc\r\n0\r\n\r\n", ";a\r\nabc\r\n0\r\n\r\n",
        "3\r\nabc\n0\r\n\r\n", "3\r\nabc0\r\n\r\n", "3\r\nabc\r\n0\n\n", "3\r\nabc\r\n0\r\n\n", "3\r\nabc\r\n0\r\n\rX",
        "3\r\nabc\r\n00000000000000000000\r\n\r\n", "3;a=\"\r\n\"\r\nabc\r\n0\r\n\r\n", "10000000000000003\r\nabc\r\n0\r\n\r\n",
        "fffffffffffffffd\r\nabc\r\n0\r\n\r\n", "3\r\nabc\r\n0\r\nX: y\nZ: a\r\n\r\n", "3\r\nabc\r\n0\r\nContent-Length: 9\r\n\r\n",
        "3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", "3\r\nabc\r\n0\r\n: y\r\n\r\n", "3\r\nabc\r\n0\r\n X: y\r\n\r\n",
        "3\r\nabc\r\n0\r\nX : y\r\n\r\n", "3\r\nabc\r\n0\r\nno colon\r\n\r\n",
    ]),
}
# A head as a whole, `*` in the place of the target and `~` of the host.
HEADS = {
    **dict.fromkeys([
        "GET *\r\n\r\n", "GET * HTTP/1.1\r\n\r\n", "GET * HTTP/1.1\nHost: ~\n\n", "GET * HTTP/1.1\r\nHost: ~\r\nHost: ~\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: ~\r\nHost : other\r\n\r\n", "GET * HTTP/1.1\r\n Host: ~\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~\r\n X: y\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: x@~\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~/x\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~:x\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: ~, ~\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~ x\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~\tx\r\n\r\n",
        "GET * HTTP/1.1 \r\nHost: ~\r\n\r\n", "GET  * HTTP/1.1\r\nHost: ~\r\n\r\n", "GET\t* HTTP/1.1\r\nHost: ~\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: ~\r\nX\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~\r\n: x\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~\r\nX y: z\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: ~\r\nX: a\x7fb\r\n\r\n", "GET * HTTP/1.1\r\nHost: ~\r\nX: a\x01b\r\n\r\n", "G\x00T * HTTP/1.1\r\nHost: ~\r\n\r\n",
        "GET *\x00 HTTP/1.1\r\nHost: ~\r\n\r\n", "GET *#/ HTTP/1.1\r\nHost: ~\r\n\r\n", "GET * HTTP/1.2\r\nHost: ~\r\n\r\n",
        "GET * HTTP/01.1\r\nHost: ~\r\n\r\n", "GET * http/1.1\r\nHost: ~\r\n\r\n", "GET * HTTP/2.0\r\nHost: ~\r\n\r\n",
        "GET ~* HTTP/1.1\r\nHost: ~\r\n\r\n", "GET http://@~* HTTP/1.1\r\nHost: ~\r\n\r\n", "GET http://x:y@~* HTTP/1.1\r\nHost: ~\r\n\r\n",
        "GET gopher://~* HTTP/1.1\r\nHost: ~\r\n\r\n", "GET http:* HTTP/1.1\r\nHost: ~\r\n\r\n", "GET \\* HTTP/1.1\r\nHost: ~\r\n\r\n",
    ]),
    "GET http://~* HTTP/1.1\r\nHost: other\r\n\r\n": b"", "\r\nGET * HTTP/1.1\r\nHost: ~\r\n\r\n": b"",
    "GET * HTTP/1.0\r\nHost: ~\r\n\r\n": b"",
}


def h1_shapes(target):
    """Name, bytes, and the body of the one request that they are; none where they must be refused."""
    head = f"POST {target} HTTP/1.1\r\nHost: {HOST}\r\n"
    length = len(SMUGGLED)
    chunk = f"{length:x}\r\n{SMUGGLED}\r\n0\r\n\r\n"
    inner = f"0\r\n\r\n{SMUGGLED}"
    for coding in CODINGS:
        ordinary = coding in ORDINARY
        clear = {"Transfer-Encoding: chunked", "Transfer-Encoding:\tchunked", "tRANSFER-ENCODING: CHUNKED"}
        yield f"CL.TE {coding!r}", f"{head}Content-Length: {len(inner)}\r\n{coding}\r\n\r\n{inner}", inner.encode() if ordinary else None
        # What is left of a chunk is no request.
        yield f"TE.CL {coding!r}", f"{head}{coding}\r\nContent-Length: 4\r\n\r\n{chunk}", chunk[:4].encode() if ordinary else None
        alone = SMUGGLED.encode() if coding in clear else b"" if ordinary else None
        yield f"TE {coding!r}", f"{head}{coding}\r\n\r\n{chunk}", alone
    for lengths, wanted in LENGTHS.items():
        yield f"CL.CL {lengths!r}", f"{head}Content-Length: {lengths}\r\n\r\nxxxxx{SMUGGLED}", wanted
    for body, wanted in CHUNKS.items():
        yield f"chunks {body!r}", f"{head}Transfer-Encoding: chunked\r\n\r\n{body}{SMUGGLED}", wanted
    for shape, wanted in HEADS.items():
        kind = "head" if shape.startswith(("GET ", "\r\n")) else "not HTTP"
        yield f"{kind} {shape!r}", shape.replace("~", HOST).replace("*", target), wanted
    # A body where none is expected, and a request hidden in what looks like one.
    hidden = SMUGGLED.encode()
    for method in ["GET", "HEAD", "OPTIONS", "DELETE", "TRACE"]:
        yield f"CL.0 {method}", f"{method} {target} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {length}\r\n\r\n{SMUGGLED}", hidden
    body = f"Content-Length: {length}\r\n\r\n{SMUGGLED}"
    yield "upgrade", f"{head}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n{body}", hidden
    yield "expect", f"{head}Expect: 100-continue\r\n{body}", hidden
    yield "expect nonsense", f"{head}Expect: x 100-continue\r\n{body}", hidden
    early = head.replace(target, f"{target}?early")
    yield "expect, and an early answer", f"{early}Expect: 100-continue\r\n{body}", ...
    yield "connection names a length", f"{head}Connection: Content-Length\r\n{body}", hidden
    yield "connection names a coding", f"{head}Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}", hidden
    # After it the edge might look no longer at what comes.
    unclear = f"POST /smuggled HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n{chunk}"
    for upgrade in ["websocket", "h2c", "x", "h2c, x"]:
        yield f"after an upgrade to {upgrade}", f"{head}Upgrade: {upgrade}\r\nContent-Length: 0\r\n\r\n{unclear}", b""


def h1():
    count = sum(1 for _ in h1_shapes("/"))
    for at in range(count):
        target = f"/outer/{next(numbers)}"
        name, data, wanted = next(itertools.islice(h1_shapes(target), at, None))
        # An upload that waits for a 100 goes on after a second.
        got, ended = answers(data.encode("utf-8"), 1.5 if name.startswith("expect") else 0.2)
        # What does not begin as HTTP does gets no answer of it.
        refused = ended and (got.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")) or name.startswith("not HTTP") and not got)
        if wanted is ...:
            good()
            seen(target)
        else:
            outcome(f"{name}, answered by {got[:300]!r}", target, wanted, refused)
    print(f"{count} shapes of HTTP/1.1", flush=True)


POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\npoisoned"


def says(*pieces):
    def answer(tcp):
        for piece in pieces:
            tcp.sendall(piece) if isinstance(piece, bytes) else time.sleep(piece)
    return answer


def ends(*pieces):
    def answer(tcp):
        says(*pieces)(tcp)
        tcp.shutdown(socket.SHUT_RDWR)
    return answer


OK = b"HTTP/1.1 200 OK\r\n"
# Answers after which the next visitor could be given what is not his.
ANSWERS = {
    "two": says(OK + b"Content-Length: 2\r\n\r\nok" + POISON),
    "two-later": says(OK + b"Content-Length: 2\r\n\r\nok", 0.01, POISON),
    "long": says(OK + b"Content-Length: 2\r\n\r\nokpoisoned"),
    "204": says(b"HTTP/1.1 204 No Content\r\n\r\n" + POISON),
    "204-length": says(b"HTTP/1.1 204 No Content\r\nContent-Length: 46\r\n\r\n" + POISON),
    "304": says(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 46\r\n\r\n" + POISON),
    "head": says(OK + b"Content-Length: 46\r\n\r\n" + POISON),
    "both": says(OK + b"Content-Length: 46\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + POISON),
    "lengths": says(OK + b"Content-Length: 2\r\nContent-Length: 48\r\n\r\nok" + POISON),
    "coding": says(OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + POISON),
    "chunk": says(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nokXX0\r\n\r\n" + POISON),
    "interim": says(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + OK + b"Content-Length: 2\r\n\r\nok" + POISON),
    "switch": says(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + POISON),
    "folded": says(OK + b"X: a\r\n Content-Length: 0\r\nContent-Length: 2\r\n\r\nok" + POISON),
    "short": ends(OK + b"Content-Length: 46\r\n\r\nok"),
    "unframed": ends(OK + b"\r\n" + POISON),
}


def answers_of_the_origin():
    """What an origin says too much is nobody's; the next on its connection gets his own."""
    for name in ANSWERS:
        for method in ["HEAD"] if name == "head" else ["GET", "POST"]:
            length = "Content-Length: 0\r\n" if method == "POST" else ""
            first = f"{method} /outer/{next(numbers)}?{name} HTTP/1.1\r\nHost: {HOST}\r\n{length}\r\n"
            # The next request of the same visitor, sent with the first and later.
            # (What comes when the next is on its way already is the answer to that.)
            for wait in [0.05] if name == "two-later" else [0, 0.05]:
                second = f"/good/{next(numbers)}"
                with connect() as tcp:
                    tcp.sendall(first.encode())
                    time.sleep(wait)
                    got = b""
                    try:
                        tcp.sendall(f"GET {second} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
                        while piece := tcp.recv(65536):
                            got += piece
                    except OSError:
                        pass
                # As the body of an answer without a length it is the origin's own word.
                if name != "unframed" and b"poisoned" in got:
                    raise AssertionError(f"{method} {name}: {got!r}")
                good()
                seen(second)


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

    def outcome(self):
        """How the edge takes a request: a status, `reset`, `goaway`, or nothing in time."""
        decoder, data, until = hpack.Decoder(), b"", time.monotonic() + 5
        self.tcp.settimeout(5)
        try:
            while time.monotonic() < until:
                while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
                    length = int.from_bytes(data[:3], "big")
                    kind, payload, data = data[3], data[9:9 + length], data[9 + length:]
                    if kind == 1:
                        return dict(decoder.decode(payload))[":status"]
                    if kind in (3, 7):
                        return "reset" if kind == 3 else "goaway"
                piece = self.tcp.recv(65536)
                if not piece:
                    return "goaway"
                data += piece
        except TimeoutError:
            return "nothing"
        except OSError:
            return "goaway"
        return "nothing"

    def close(self):
        self.tcp.close()


def request(path="/outer", method="GET", more=()):
    return [(":method", method), (":scheme", "http"), (":path", path), (":authority", HOST), *more]


def h2_smuggling():
    """Content-Length and Transfer-Encoding that lie, line ends in names, values and paths."""
    hidden = (SMUGGLED + "\r\n\r\n").encode()
    chunk = b"0\r\n\r\n" + hidden

    def shapes(target):
        def post(*more):
            return request(target, "POST", more)

        def only(**fields):
            named = {"method": "GET", "scheme": "http", "path": target, "authority": HOST} | fields
            return [(f":{name}", value) for name, value in named.items() if value is not None]

        # The head may be on its way before the body turns out to be longer than nothing.
        yield "H2.CL 0", post(("content-length", "0")), hidden, [[], [b""]]
        yield "H2.CL short", post(("content-length", "5")), hidden, [[]]
        yield "H2.CL long", post(("content-length", "5000")), b"x", [[]]
        yield "H2.CL twice", post(("content-length", "0"), ("content-length", "79")), hidden, [[]]
        yield "H2.CL list", post(("content-length", "0, 79")), hidden, [[]]
        yield "H2.CL sign", post(("content-length", "+79")), hidden, [[]]
        yield "H2.TE", post(("transfer-encoding", "chunked")), chunk, [[]]
        yield "H2.TE and trailers", post(("te", "chunked")), chunk, [[]]
        yield "connection", post(("connection", "transfer-encoding")), chunk, [[]]
        yield "upgrade", post(("upgrade", "h2c")), chunk, [[]]
        yield "line end in a value", post(("x", "y\r\ntransfer-encoding: chunked")), chunk, [[]]
        yield "line end in a name", post(("x: y\r\ntransfer-encoding", "chunked")), chunk, [[]]
        yield "line feed in a value", post(("x", "y\ncontent-length: 0")), hidden, [[]]
        yield "carriage return in a value", post(("x", "y\rcontent-length: 0")), hidden, [[]]
        yield "NUL in a value", post(("x", "a\x00b")), b"", [[]]
        yield "colon in a name", post(("transfer-encoding: chunked\r\nx:", "y")), chunk, [[]]
        yield "space in a name", post(("transfer-encoding ", "chunked")), chunk, [[]]
        yield "upper case", post(("Transfer-Encoding", "chunked")), chunk, [[]]
        yield "empty name", post(("", "x")), b"", [[]]
        yield "unknown pseudo-field", post((":x", "y")), b"", [[]]
        yield "late pseudo-field", post(("x", "y"), (":path", "/smuggled")), b"", [[]]
        yield "two paths", post((":path", "/smuggled")), b"", [[]]
        yield "two methods", post((":method", "GET")), b"", [[]]
        yield "line end in :path", only(path=f"{target} HTTP/1.1\r\nx: y\r\n\r\nGET /smuggled"), b"", [[]]
        yield "space in :path", only(path=f"{target} HTTP/1.1 /smuggled"), b"", [[]]
        yield "fragment in :path", only(path=f"{target}#x"), b"", [[], [b""]]
        yield "no slash in :path", only(path=f"@other{target}"), b"", [[]]
        yield "whole URL in :path", only(path=f"http://other{target}"), b"", [[]]
        yield "line end in :method", only(method=f"GET {target} HTTP/1.1\r\nx: y\r\n\r\nGET"), b"", [[]]
        yield "space in :method", only(method="GET /smuggled"), b"", [[]]
        yield "line end in :authority", only(authority=f"{HOST}\r\nx: y"), b"", [[]]
        yield "user in :authority", only(authority=f"x@{HOST}"), b"", [[]]
        yield "path in :authority", only(authority=f"{HOST}/smuggled?"), b"", [[]]
        yield "target in :scheme", only(scheme="http://other/?"), b"", [[]]
        yield "line end in :scheme", only(scheme="http\r\nx: y"), b"", [[]]
        yield "no :method", only(method=None), b"", [[]]
        yield "no :path", only(path=None), b"", [[]]
        yield "empty :path", only(path=""), b"", [[]]
        yield "no authority", only(authority=None), b"", [[]]
        yield "other host", [*only(), ("host", "other.edge.localhost")], b"", [[]]
        yield "two hosts", [*only(), ("host", HOST), ("host", HOST)], b"", [[]]
        yield "CONNECT", only(method="CONNECT", scheme=None, path=None), b"", [[]]
        yield "another protocol", [*only(method="CONNECT"), (":protocol", "connect-udp")], b"", [[]]
        yield "as it should be", post(("content-length", str(len(hidden)))), hidden, [[hidden]]
        yield "GET with a body", request(target), hidden, [[hidden]]

    count = sum(1 for _ in shapes("/"))
    for at in range(count):
        target = f"/outer/{next(numbers)}"
        name, fields, body, allowed = next(itertools.islice(shapes(target), at, None))
        h2 = H2()
        frames = [h2.headers(1, fields, ["END_HEADERS"] if body else ["END_HEADERS", "END_STREAM"], raw=True)]
        if body:
            frames.append(frame.DataFrame(1, data=body, flags=["END_STREAM"]))
        try:
            h2.send(*frames)
        except OSError:
            pass
        told = h2.outcome()
        h2.close()
        good()
        bodies = [body for _, _, _, body in seen(target)]
        if bodies not in allowed:
            raise AssertionError(f"{name}: the origin saw {bodies}; the visitor {told}")
        fine = {"200"} if allowed == [[hidden]] else {"reset", "goaway", "400", "404", "405"}
        fine |= {"200"} if [b""] in allowed else set()
        # An answer of the origin may be there before the body turns out to lie.
        if told not in fine:
            raise AssertionError(f"{name}: the visitor got {told}")
    print(f"{count} shapes of HTTP/2", flush=True)


def none_of(target):
    if seen(target):
        raise AssertionError(f"the origin saw {target}")


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


def zero_window():
    """A hundred streams whose answers nobody takes; another visitor is served."""
    h2 = H2()
    h2.send(frame.SettingsFrame(0, settings={4: 0}))
    h2.send(*[h2.headers(1 + 2 * n, request()) for n in range(100)])
    for _ in range(5):
        good()
    h2.close()


def hpack_bomb():
    """One large entry of the table, named again and again."""
    h2 = H2()
    # 0x7f 0x81 0x1e: a length of 127 + 1 + 30 * 128 = 3968; what follows are names of it.
    block = h2.encoder.encode(request("/bomb")) + b"\x40\x01x\x7f\x81\x1e" + b"y" * 3968 + b"\xbe" * 12_000
    h2.send(frame.HeadersFrame(1, data=block[:16_000], flags=["END_STREAM", "END_HEADERS"]))
    h2.reads()
    good()
    h2.close()
    none_of("/bomb")


def many_fields():
    for count, size in [(5000, 10), (200, 10), (100, 1000)]:
        h2 = H2()
        block = h2.encoder.encode(request("/fields", more=[(f"x-{n}", "y" * size) for n in range(count)]))
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
        none_of("/fields")


origin = Origin()
origin.start()
print(f"port {origin.port}", flush=True)
address, port = sys.stdin.readline().split()
edge = (address, int(port))
for attack in [h1, answers_of_the_origin, h2_smuggling, continuation_flood, empty_continuation_flood, rapid_reset, resets_provoked, settings_flood,
               ping_flood, priority_flood, empty_data_flood, zero_window, hpack_bomb, many_fields]:
    begun = time.monotonic()
    try:
        attack()
        print(f"ok {attack.__name__} {time.monotonic() - begun:.1f}s", flush=True)
    except Exception as error:
        print(f"wrong {attack.__name__}: {type(error).__name__} {error}", flush=True)
print("done", flush=True)
