"""Registers a forward with asyncssh and serves it: host port key name public target."""

import asyncio
import sys

import asyncssh


async def main():
    host, port, key, name, public, target = sys.argv[1:]
    async with asyncssh.connect(
        host, int(port), username="tester", client_keys=[key], known_hosts=None, config=None, agent_path=None
    ) as connection:
        for _ in range(2):
            listener = await connection.forward_remote_port(name, int(public), "127.0.0.1", int(target))
            print("registered", flush=True)
            # A line on standard input: cancel it, and add it again.
            line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
            if not line:
                return
            listener.close()
            await listener.wait_closed()
            print("cancelled", flush=True)


asyncio.run(main())
