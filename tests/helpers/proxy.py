"""A connection that cannot be relied on: a TCP proxy on the loopback that does harm.

A seed decides what befalls each connection, and at which byte of it.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections import Counter
from collections.abc import Coroutine
from math import inf
from typing import Any

HARMS = ("drop", "delay", "truncate")
_LONGEST = 0.4
"""Seconds that bytes may be late."""
_NEVER = 1e15


class Proxy:
    """Passes connections on to a port of the loopback.

    Args:
        port (int): Where they go.
        seed (int): Decides what befalls them.
        every (float): Bytes of a connection, in one direction, that come to no harm, on average.
        life (float): Seconds that a connection lasts, on average.
        speed (float): Bytes that pass a connection in a second, in one direction.
        most (float): Bytes of a connection, in one direction, after which it breaks.

    Attributes:
        port (int): Where it listens.
        asked (list): What each connection has asked it for, where it is an HTTP proxy: to be passed
            on, which it is wherever that is to go.
        done (Counter): How often each kind of harm was done.
    """

    def __init__(
        self,
        port: int,
        seed: int = 0,
        every: float = inf,
        life: float = inf,
        speed: float = inf,
        most: float = inf,
    ):
        self.seed, self.every, self.life, self.speed, self.most = seed, every, life, speed, most
        self.done: Counter[str] = Counter()
        self._to = port
        self.asked: list[str] | None = None
        self._number = 0
        self._swallows: tuple[str, ...] = ()
        self._says: bytes | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self.mend()

    def refuse(self) -> None:
        """Breaks all connections, and lets none be made."""
        self._do(self._refuse())

    def swallow(self) -> None:
        """Lets nothing through any more, and says nothing either, of these connections for good."""
        self._swallows = ("up", "down")

    def deafen(self) -> None:
        """Lets requests through, and no answers any more, of these connections for good."""
        self._swallows = ("down",)

    def say(self, answer: bytes) -> None:
        """Answers each request so itself, as a proxy whose server is gone, and hangs up."""
        self._do(self._refuse())
        self._says = answer
        self._do(self._listen())

    def mend(self) -> None:
        """Lets new connections through."""
        self._swallows, self._says = (), None
        self._do(self._listen())

    def close(self) -> None:
        """Ends it, with all its connections."""
        self._do(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._says is not None:
            await reader.read(2**16)
            writer.write(self._says)
            writer.close()
            return
        if self.asked is not None:
            self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self._number += 1
        number = f"{self.seed} {self._number}"
        try:
            there, back = await asyncio.open_connection(sock=await self._reach())
        except OSError:  # there is no server
            writer.transport.abort()
            return
        ends = {writer, back}
        self._open |= ends
        end = self._loop.call_later(_drawn(random.Random(number), self.life), self._drop, ends)
        await asyncio.gather(
            self._pass("up", reader, back, ends, random.Random(f"{number} up")),
            self._pass("down", there, writer, ends, random.Random(f"{number} down")),
        )
        end.cancel()
        self._open -= ends

    async def _reach(self) -> socket.socket:
        """A connection to the other side, which has not sent what is on its way here if that is
        slow."""
        # asyncio sets TCP_NODELAY where it sees the protocol.
        reached = socket.socket(proto=socket.IPPROTO_TCP)
        reached.setblocking(False)
        if self.speed < inf:
            reached.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        try:
            await self._loop.sock_connect(reached, ("127.0.0.1", self._to))
        except OSError:
            reached.close()
            raise
        return reached

    def _drop(self, ends: set[asyncio.StreamWriter]) -> None:
        self.done["drop"] += 1
        for end in ends:
            end.transport.abort()

    async def _pass(
        self,
        way: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: set[asyncio.StreamWriter],
        rng: random.Random,
    ) -> None:
        swallowed, passed = False, 0
        try:
            left = _drawn(rng, self.every)
            while data := await reader.read(2**16):
                swallowed = swallowed or way in self._swallows
                if swallowed:
                    continue
                if len(data) > left:
                    harm = rng.choice(HARMS)
                    if harm == "drop":
                        self._drop(ends)
                        return
                    self.done[harm] += 1
                    if harm == "truncate":
                        writer.write(data[: int(left)])
                        break
                    await asyncio.sleep(rng.uniform(0, _LONGEST))
                    left = _drawn(rng, self.every)
                left -= len(data)
                passed += len(data)
                if passed > self.most:
                    self._drop(ends)
                    return
                await asyncio.sleep(len(data) / self.speed)
                writer.write(data)
                await writer.drain()
        except OSError:  # one of the ends is gone
            pass
        for end in ends:
            end.close()


def _drawn(rng: random.Random, mean: float) -> float:
    return rng.expovariate(1 / mean) if mean < inf else _NEVER
