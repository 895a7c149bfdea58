"""A TCP relay in front of one part of a mesh, to take it away: frozen (sockets open, nothing moves) or cut."""

import asyncio
from contextlib import suppress


class Proxy:
    """Listens at `host`:`port` (0: any) and relays to `target`."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.target = ("127.0.0.1", 0)
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, port: int = 0) -> int:
        """The port bound. Set `target` before anyone connects."""
        self._server = await asyncio.start_server(self._accept, self.host, port)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self.port

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    def cut(self) -> None:
        """Resets every connection and refuses new ones."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self.thaw()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            target_reader, target_writer = await asyncio.open_connection(*self.target)
            self._writers |= {writer, target_writer}
            try:
                await asyncio.gather(self._relay(reader, target_writer), self._relay(target_reader, writer))
            finally:
                self._writers -= {writer, target_writer}
                target_writer.close()
        writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._thawed.wait()
            writer.write(data)
            await writer.drain()
        writer.close()
