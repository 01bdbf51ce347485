"""Registers a forward with paramiko and serves it: host port key name public target."""

import socket
import sys
import threading

import paramiko

host, port, key, name, public, target = sys.argv[1:]
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect(host, int(port), "tester", key_filename=key, look_for_keys=False, allow_agent=False)
transport = client.get_transport()


def copy(source, sink):
    while True:
        piece = source.recv(65536)
        if not piece:
            break
        sink.sendall(piece)
    # The end of one way alone.
    try:
        if isinstance(sink, socket.socket):
            sink.shutdown(socket.SHUT_WR)
        else:
            sink.shutdown_write()
    except OSError:
        pass


def serve(channel):
    origin = socket.create_connection(("127.0.0.1", int(target)))
    back = threading.Thread(target=copy, args=(origin, channel), daemon=True)
    back.start()
    copy(channel, origin)
    back.join()
    channel.close()
    origin.close()


def serve_all():
    while True:
        channel = transport.accept()
        if channel is not None:
            threading.Thread(target=serve, args=(channel,), daemon=True).start()


threading.Thread(target=serve_all, daemon=True).start()
for _ in range(2):
    transport.request_port_forward(name, int(public))
    print("registered", flush=True)
    # A line on standard input: cancel it, and add it again.
    if not sys.stdin.readline():
        break
    transport.cancel_port_forward(name, int(public))
    print("cancelled", flush=True)
