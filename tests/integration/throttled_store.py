"""A source of chunks behind a slow link, over real gRPC: bytes leave at a rate that tests set, and may stop coming."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from kvmesh.kv import bitstream
from kvmesh.v1 import kvstore_pb2 as pb
from kvmesh.v1 import kvstore_pb2_grpc

FRAME = 1024


@dataclass
class Line:
    """One link that all calls share, first come first served. `rates`: bytes per second from so many bytes sent on."""

    rates: dict[int, float]
    sent: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def rate(self) -> float:
        return next(rate for start, rate in sorted(self.rates.items(), reverse=True) if self.sent >= start)

    async def carry(self, size: int) -> None:
        async with self._turn:
            await asyncio.sleep(size / self.rate)
            self.sent += size


class ThrottledStore(kvstore_pb2_grpc.ChunkSourceServiceServicer, kvstore_pb2_grpc.KvStoreServiceServicer):
    """`chunks`: bitstreams by key. `stalled`: keys whose data never come. `asked`: (key, layers) of each request."""

    def __init__(self, chunks: dict[bytes, bytes], line: Line) -> None:
        self.chunks = chunks
        self.line = line
        self.stalled: set[bytes] = set()
        self.asked: list[tuple[bytes, int]] = []

    async def GetChunks(self, request, context):
        for key in request.keys:
            self.asked.append((key, request.quality_layers))
            bits = self.chunks[key]
            ends = bitstream.read_header(bits).layer_ends
            bits = bits[: ends[min(request.quality_layers or len(ends), len(ends)) - 1]]
            header = pb.GetChunkHeader(key=key, status=pb.CHUNK_STATUS_OK, size=len(bits), layer_ends=ends)
            yield pb.GetChunksResponse(header=header)
            if key in self.stalled:
                await asyncio.Event().wait()
            for start in range(0, len(bits), FRAME):
                part = bytes(bits[start : start + FRAME])
                await self.line.carry(len(part))
                yield pb.GetChunksResponse(data=part)

    async def StatChunks(self, request, context):
        return pb.StatChunksResponse(chunks=[self._stat(key) for key in request.keys])

    def _stat(self, key):
        if key not in self.chunks:
            return pb.ChunkStat(key=key)
        header = bitstream.read_header(self.chunks[key])
        ends = header.layer_ends
        return pb.ChunkStat(key=key, present=True, size=ends[-1], layer_ends=ends, codec_id=header.codec)


@asynccontextmanager
async def serving(store: ThrottledStore) -> AsyncIterator[str]:
    """Its address."""
    server = grpc.aio.server()
    kvstore_pb2_grpc.add_ChunkSourceServiceServicer_to_server(store, server)
    kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(store, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
