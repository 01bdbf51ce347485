"""A gRPC service and calls of it through the edge.

Arguments: key file and certificate of a TLS service, or nothing. Prints the
port that it serves on; each line on standard input is then `CALL ADDRESS CA NAME
MESSAGES`, and is answered by `ok CALL` or by what was wrong.
"""

import sys
import threading
import time
from concurrent import futures

import grpc

cancelled = threading.Event()
SERVICE = "adit.Test"


def unary(request, context):
    context.send_initial_metadata((("first", "1"),))
    metadata = dict(context.invocation_metadata())
    context.set_trailing_metadata((("last", metadata.get("said", "?")), ("bin-bin", b"\x00\xff")))
    return request[::-1]


def down(request, context):
    for n in range(int(request)):
        yield b"%d" % n


def up(requests, context):
    return b"%d" % sum(int(request) for request in requests)


def both(requests, context):
    for request in requests:
        yield request


def slow(request, context):
    context.add_callback(cancelled.set)
    time.sleep(3)
    return b"late"


def fails(request, context):
    context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: ü")


def quiet(requests, context):
    """Says nothing until it is asked something."""
    for request in requests:
        time.sleep(float(request))
        yield b"now"
        return


def serve():
    rpc = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Down": grpc.unary_stream_rpc_method_handler(down),
        "Up": grpc.stream_unary_rpc_method_handler(up),
        "Both": grpc.stream_stream_rpc_method_handler(both),
        "Slow": grpc.unary_unary_rpc_method_handler(slow),
        "Fails": grpc.unary_unary_rpc_method_handler(fails),
        "Quiet": grpc.stream_stream_rpc_method_handler(quiet),
    }
    server = grpc.server(futures.ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, rpc),))
    if len(sys.argv) > 1:
        key, chain = (open(name, "rb").read() for name in sys.argv[1:3])
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"port {port}", flush=True)
    return server


def expect(is_, should):
    if is_ != should:
        raise AssertionError(f"{is_!r}, not {should!r}")


def code_of(call):
    try:
        call()
        return None
    except grpc.RpcError as error:
        return error.code(), error.details()


def calls(channel, messages):
    method = lambda kind, name: getattr(channel, kind)(f"/{SERVICE}/{name}")
    answer, call = method("unary_unary", "Unary").with_call(b"hello", metadata=(("said", "so"),), timeout=20)
    expect(answer, b"olleh")
    expect(dict(call.initial_metadata()).get("first"), "1")
    expect(dict(call.trailing_metadata()).get("last"), "so")
    expect(dict(call.trailing_metadata()).get("bin-bin"), b"\x00\xff")
    large = bytes(range(256)) * 12_000
    expect(method("unary_unary", "Unary")(large, timeout=20), large[::-1])
    expect(list(method("unary_stream", "Down")(b"200", timeout=20)), [b"%d" % n for n in range(200)])
    expect(method("stream_unary", "Up")((b"%d" % n for n in range(200)), timeout=20), b"19900")
    stream = method("stream_stream", "Both")((b"%d" % n for n in range(messages)), timeout=120)
    expect(list(stream), [b"%d" % n for n in range(messages)])
    # Each message must come before the next is sent.
    turn = threading.Semaphore(1)

    def in_turn():
        for n in range(100):
            turn.acquire()
            yield b"%d" % n

    got = 0
    for got, message in enumerate(method("stream_stream", "Both")(in_turn(), timeout=60)):
        expect(message, b"%d" % got)
        turn.release()
    expect(got, 99)

    cancelled.clear()
    expect(code_of(lambda: method("unary_unary", "Slow")(b"", timeout=0.3))[0], grpc.StatusCode.DEADLINE_EXCEEDED)
    expect(cancelled.wait(2), True)
    expect(code_of(lambda: method("unary_unary", "Fails")(b"", timeout=20)),
           (grpc.StatusCode.NOT_FOUND, "no such thing: ü"))
    expect(code_of(lambda: method("unary_unary", "Missing")(b"", timeout=20))[0], grpc.StatusCode.UNIMPLEMENTED)
    # Many at once on one connection.
    pending = [method("unary_unary", "Unary").future(b"%d" % n, timeout=20) for n in range(200)]
    for n, one in enumerate(pending):
        expect(one.result(), (b"%d" % n)[::-1])


def quiet_call(channel, messages):
    """An answer that is late, but in time for a call of gRPC."""
    stream = channel.stream_stream(f"/{SERVICE}/Quiet")(iter([b"%d" % messages]), timeout=60)
    expect(list(stream), [b"now"])


def unavailable(channel, messages):
    expect(code_of(lambda: channel.unary_unary(f"/{SERVICE}/Unary")(b"", timeout=20)),
           (grpc.StatusCode.UNAVAILABLE, "This service is not connected at the moment."))


def breaks(channel, messages):
    """The tunnel is ended while a stream runs."""
    stream = channel.stream_stream(f"/{SERVICE}/Both")(endless(), timeout=60)
    expect(next(stream), b"0")
    print("streaming", flush=True)
    code = code_of(lambda: list(stream))
    expect(code and code[0], grpc.StatusCode.UNAVAILABLE)


def endless():
    for n in range(10_000):
        yield b"%d" % n
        time.sleep(0.01)


server = serve()
for line in sys.stdin:
    name, address, ca, host, messages = line.split()
    options = (("grpc.ssl_target_name_override", host), ("grpc.default_authority", host),
               ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
    if ca == "-":
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(open(ca, "rb").read()), options)
    try:
        {"calls": calls, "quiet": quiet_call, "unavailable": unavailable, "breaks": breaks}[name](channel, int(messages))
        print("ok", name, flush=True)
    except Exception as error:
        print("wrong", name, type(error).__name__, str(error)[:2000], flush=True)
    channel.close()
server.stop(None)
