"""A WebSocket echo behaves through the edge as it does directly.

Prints `port N` of the echo, which speaks TLS where a key and a chain are given; a
line `URL CA NODE_ADDRESS` on standard input plays every check directly and
through the edge, and prints what differs.
"""

import asyncio
import logging
import os
import socket
import ssl
import sys

import websockets.asyncio.client as client
import websockets.asyncio.server as server
import websockets.exceptions
from websockets.frames import Opcode

LIMIT = 32 << 20
# What the checks provoke: its tracebacks would run into the lines that count.
logging.disable(logging.CRITICAL)


async def echo(ws):
    async for message in ws:
        if message == "close 4001":
            await ws.close(4001, "as you wish")
        elif message == "vanish":
            ws.transport.abort()
        elif message == "in pieces":
            await ws.send(iter(["one ", "two ", "three"]))
        elif message == "ping me":
            await (await ws.ping(b"payload"))
            await ws.send("pinged")
        else:
            await ws.send(message)


async def ended(ws):
    """How a connection ends: code and reason."""
    try:
        while True:
            await asyncio.wait_for(ws.recv(), 15)
    except websockets.exceptions.ConnectionClosed as closed:
        received = closed.rcvd
        return (received.code, received.reason) if received else None


async def raw(ws, *frames):
    """Bytes as they are, past the library's own checks."""
    ws.transport.write(b"".join(frames))


def masked(first, payload, length=None):
    mask = os.urandom(4)
    n = len(payload) if length is None else length
    if n < 126:
        head = bytes([first, 0x80 | n])
    elif n < 65536:
        head = bytes([first, 0x80 | 126]) + n.to_bytes(2, "big")
    else:
        head = bytes([first, 0x80 | 127]) + n.to_bytes(8, "big")
    return head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


async def sizes(ws):
    got = []
    for n in [0, 1, 125, 126, 127, 65535, 65536, 1 << 20, 16 << 20]:
        message = bytes(range(256)) * (n // 256) + bytes(n % 256)
        await ws.send(message)
        got.append(await asyncio.wait_for(ws.recv(), 30) == message)
    return got


async def texts(ws):
    got = []
    for text in ["", "ascii", "ü€😀", "\ufeff\u0000\uffff", "x" * 70_000]:
        await ws.send(text)
        got.append(await asyncio.wait_for(ws.recv(), 15) == text)
    return got


async def fragments(ws):
    await ws.send(["frag", "", "men", "ted ü"])
    first = await asyncio.wait_for(ws.recv(), 15)
    await ws.send([bytes([n]) * 1000 for n in range(100)])
    return first, await asyncio.wait_for(ws.recv(), 15) == b"".join(bytes([n]) * 1000 for n in range(100))


async def fragments_down(ws):
    await ws.send("in pieces")
    return [piece async for piece in ws.recv_streaming()]


async def ping_between_fragments(ws):
    await raw(ws, masked(0x01, b"he"), masked(0x89, b"p"), masked(0x80, b"llo"))
    return await asyncio.wait_for(ws.recv(), 15)


async def byte_by_byte(ws):
    for byte in masked(0x81, b"slowly"):
        ws.transport.write(bytes([byte]))
        await asyncio.sleep(0.005)
    return await asyncio.wait_for(ws.recv(), 15)


async def fragments_within_a_character(ws):
    euro = "€".encode()
    await raw(ws, masked(0x01, euro[:1]), masked(0x00, euro[1:2]), masked(0x80, euro[2:]))
    return await asyncio.wait_for(ws.recv(), 15)


async def many_fragments(ws):
    pieces = [bytes([n % 256]) * 4096 for n in range(4096)]
    await ws.send(pieces)
    return await asyncio.wait_for(ws.recv(), 60) == b"".join(pieces)


async def many_messages(ws):
    async def send():
        for n in range(2000):
            await ws.send(f"{n} " + "y" * (n % 300))
    sending = asyncio.create_task(send())
    got = [int((await asyncio.wait_for(ws.recv(), 15)).split()[0]) for _ in range(2000)]
    await sending
    return got == list(range(2000))


async def data_after_close(ws):
    await raw(ws, masked(0x88, (1000).to_bytes(2, "big")), masked(0x81, b"late"))
    return await ended(ws)


async def close_without_a_code(ws):
    await raw(ws, masked(0x88, b""))
    return await ended(ws)


async def pings(ws):
    for payload in [b"", b"x" * 125]:
        await asyncio.wait_for(await ws.ping(payload), 15)
    await ws.send("ping me")
    return await asyncio.wait_for(ws.recv(), 15)


def closing(code):
    async def check(ws):
        await ws.close(code, "bye ü")
        return ws.close_code
    check.__name__ = f"close_{code}"
    return check


async def closed_by_the_origin(ws):
    await ws.send("close 4001")
    return await ended(ws)


async def origin_vanishes(ws):
    await ws.send("vanish")
    return await ended(ws)


def wrong(name, *frames):
    async def check(ws):
        await raw(ws, *frames)
        return await ended(ws)
    check.__name__ = name
    return check


CHECKS = [
    sizes, texts, fragments, fragments_down, ping_between_fragments, byte_by_byte, pings,
    fragments_within_a_character, many_fragments, many_messages, data_after_close, close_without_a_code,
    closing(1000), closing(1001), closing(3000), closing(4999), closed_by_the_origin, origin_vanishes,
    wrong("invalid UTF-8", masked(0x81, b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80")),
    wrong("invalid UTF-8 in a fragment", masked(0x01, b"ok"), masked(0x80, b"\xff")),
    wrong("cut UTF-8", masked(0x81, b"\xf0\x9f\x98")),
    wrong("reserved opcode", masked(0x83, b"x")),
    wrong("reserved bit", masked(0x90 | 0x81, b"x")),
    wrong("large ping", masked(0x89, b"x" * 126)),
    wrong("fragmented ping", masked(0x09, b"x")),
    wrong("continuation of nothing", masked(0x80, b"x")),
    wrong("text within fragments", masked(0x01, b"a"), masked(0x81, b"b")),
    wrong("unmasked", b"\x81\x01x"),
    wrong("close of one byte", masked(0x88, b"\x03")),
    *[wrong(f"close with {code}", masked(0x88, code.to_bytes(2, "big"))) for code in [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535]],
    wrong("close with bad UTF-8", masked(0x88, (1000).to_bytes(2, "big") + b"\xff")),
    wrong("more than the echo takes", masked(0x82, b"", length=LIMIT * 2)),
]


async def play(connect):
    results = {}
    for check in CHECKS:
        for compression in ("deflate", None):
            try:
                async with connect(compression) as ws:
                    result = await asyncio.wait_for(check(ws), 60)
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            results[f"{check.__name__} ({compression})"] = result
    return results


async def main():
    tls, trusts = None, {}
    if sys.argv[1:]:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(sys.argv[2], sys.argv[1])
        trusts = dict(ssl=ssl.create_default_context(cafile=sys.argv[2]), server_hostname="echo.test")
    async with server.serve(echo, "127.0.0.1", 0, ssl=tls, max_size=LIMIT, subprotocols=["chat"]) as listening:
        port = listening.sockets[0].getsockname()[1]
        print(f"port {port}", flush=True)
        url, ca, address = (await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)).split()
        options = dict(max_size=LIMIT, subprotocols=["chat"], open_timeout=15, close_timeout=10, proxy=None)

        def directly(compression):
            scheme = "wss" if trusts else "ws"
            return client.connect(f"{scheme}://127.0.0.1:{port}/", compression=compression, **trusts, **options)

        def through(compression):
            host, node_port = address.rsplit(":", 1)
            secure = dict(ssl=ssl.create_default_context(cafile=ca)) if url.startswith("wss") else {}
            return client.connect(url, host=host, port=int(node_port), compression=compression, **secure, **options)

        straight, proxied = await play(directly), await play(through)
        for name, result in straight.items():
            same = proxied[name] == result
            print("same" if same else "DIFFERS", name, repr(result)[:100], "" if same else repr(proxied[name])[:200], flush=True)
        print("done", flush=True)


asyncio.run(main())
