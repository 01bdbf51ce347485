"""httpx through the edge: ADDRESS:PORT CA DIRECT_PORT EVENTS."""

import concurrent.futures
import ssl
import statistics
import sys
import time

import httpx

address, ca, direct, events = sys.argv[1:]
HOST = "web.edge.localhost"
port = address.rsplit(":", 1)[1]
context = ssl.create_default_context(cafile=ca)


class ToNode(httpx.HTTPTransport):
    """Connects to the node whatever the name resolves to."""

    def handle_request(self, request):
        request.extensions["sni_hostname"] = HOST
        request.url = request.url.copy_with(host=address.rsplit(":", 1)[0])
        return super().handle_request(request)


def client(http2):
    transport = ToNode(verify=context, http1=not http2, http2=http2)
    return httpx.Client(transport=transport, headers={"Host": f"{HOST}:{port}"}, timeout=20)


def lockstep(client, base):
    """Each event must have come before the next is sent; the delays from the one to the other."""
    delays = []
    with client.stream("GET", f"{base}/events?n={events}") as answer:
        assert answer.headers["content-type"] == "text/event-stream", answer.headers
        at = None
        for line in answer.iter_lines():
            if line.startswith("data: "):
                now = time.perf_counter()
                if at is not None:
                    delays.append(now - at)
                at = time.perf_counter()
                assert client.get(f"{base}/heard/{line[6:]}").status_code == 200
    assert len(delays) == int(events) - 1, len(delays)
    return delays


def tell(name, delays):
    delays.sort()
    p99 = delays[min(len(delays) - 1, len(delays) * 99 // 100)]
    print(f"{name}: {len(delays)} events, round p50 {statistics.median(delays) * 1e3:.2f} ms p99 {p99 * 1e3:.2f} ms", flush=True)


for http2 in (False, True):
    name = "h2" if http2 else "h1"
    with client(http2) as one:
        base = f"https://{HOST}:{port}"
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda n: one.get(f"{base}/asset/{n}.svg"), range(200)))
        assert all(a.status_code == 200 for a in answers)
        assert {a.http_version for a in answers} == {"HTTP/2" if http2 else "HTTP/1.1"}, answers[0].http_version
        tell(name, lockstep(one, base))
with httpx.Client(timeout=20) as one:
    tell("direct", lockstep(one, f"http://127.0.0.1:{direct}"))
print("done")
