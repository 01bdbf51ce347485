#!/usr/bin/env python3
"""Links between network namespaces with delay, jitter, loss and rate: a TUN device at
each end, and this program between them (for kernels without netem).

    links.py SEED LINK...    LINK = NAME,NS:DEVICE:ADDRESS/BITS,NS:DEVICE:ADDRESS/BITS,RTT_MS

Says `up`, then does what its input says until that ends, answering each line `ok`:
    set NAME rtt MS | jitter MS | loss PERCENT | rate MBIT (0: none)
    cut NAME | heal NAME
Packets keep their order; at most 10,000 wait."""
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
HOME = os.open("/proc/self/ns/net", os.O_RDONLY)
WAITING_MAX = 10_000


def tun(end):
    namespace, device, address = end.split(":")
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    assert LIBC.setns(fd, 0x40000000) == 0, "setns"
    os.close(fd)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    # IFF_TUN | IFF_NO_PI
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH14x", device.encode(), 0x1001))
    for line in (f"ip addr add {address} dev {device}", f"ip link set {device} mtu 1500 txqueuelen 1000 up"):
        subprocess.run(line.split(), check=True)
    LIBC.setns(HOME, 0x40000000)
    return tun


class Link:
    def __init__(self, text):
        self.name, a, b, rtt = text.split(",")
        self.ends = tun(a), tun(b)
        self.rtt, self.jitter, self.loss, self.rate, self.is_cut = float(rtt), 0.0, 0.0, 0.0, False
        self.free = {end: 0.0 for end in self.ends}
        self.last = {end: 0.0 for end in self.ends}

    def other(self, end):
        return self.ends[1] if end == self.ends[0] else self.ends[0]

    def due(self, end, size, now):
        """When a packet arrives at the other end; None: it is lost."""
        if self.is_cut or random.random() * 100 < self.loss:
            return None
        at = now
        if self.rate:
            self.free[end] = at = max(now, self.free[end]) + size * 8 / (self.rate * 1e6)
        at += (self.rtt / 2 + random.uniform(-self.jitter, self.jitter)) / 1e3
        self.last[end] = at = max(self.last[end], at)
        return at


def obey(line, links):
    word, name, *rest = line.split()
    link = next(link for link in links if link.name == name)
    if word == "set":
        assert rest[0] in ("rtt", "jitter", "loss", "rate"), line
        setattr(link, rest[0], float(rest[1]))
    else:
        link.is_cut = {"cut": True, "heal": False}[word]


def main():
    random.seed(sys.argv[1])
    links = [Link(text) for text in sys.argv[2:]]
    of = {end: link for link in links for end in link.ends}
    waiting, count, typed = [], 0, b""
    print("up", flush=True)
    while True:
        now = time.monotonic()
        pause = min(0.05, max(0, waiting[0][0] - now)) if waiting else 0.05
        for fd in select.select([*of, 0], [], [], pause)[0]:
            if fd == 0:
                said = os.read(0, 4096)
                if not said:
                    return
                *lines, typed = (typed + said).split(b"\n")
                for line in lines:
                    obey(line.decode(), links)
                    print("ok", flush=True)
                continue
            for _ in range(64):
                try:
                    packet = os.read(fd, 2048)
                except BlockingIOError:
                    break
                at = of[fd].due(fd, len(packet), time.monotonic())
                if at is not None and len(waiting) < WAITING_MAX:
                    count += 1
                    heapq.heappush(waiting, (at, count, fd, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, fd, packet = heapq.heappop(waiting)
            if not of[fd].is_cut:
                try:
                    os.write(of[fd].other(fd), packet)
                except OSError:
                    pass


main()
