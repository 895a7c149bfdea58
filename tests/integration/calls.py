"""Calls to workers as the router makes them, and what one engine alone would have answered."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmesh.engine.api import EngineRequest, Sample, TokenOutput
from kvmesh.engine.fake import FAKE_EOS, fake_engine, fake_layout
from kvmesh.kv.keys import fingerprint, namespace_root
from kvmesh.kv.ticket import write_ticket
from kvmesh.rpc.convert import sampling_to_proto, ticket_to_proto
from kvmesh.rpc.stream import stream, unary
from kvmesh.types import ChunkSource, KvTicket, Role, SamplingParams
from kvmesh.v1 import decode_pb2, prefill_pb2
from kvmesh.v1.decode_pb2_grpc import DecodeServiceStub
from kvmesh.v1.prefill_pb2_grpc import PrefillServiceStub
from tests.integration.mesh import Mesh

FINGERPRINT = fingerprint(fake_layout(fake_engine(blocks=1).layout))
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, eos_token_ids=frozenset({FAKE_EOS}))
TIMEOUT = 30.0
_numbers = itertools.count()


def prompt(tokens: int, salt: int = 0) -> tuple[int, ...]:
    return tuple((i * 7 + salt) % 250 for i in range(tokens))


def undisturbed(tokens: Sequence[int], sampling: SamplingParams = GREEDY) -> list[list[int]]:
    """The output of each sample from one engine that is alone."""
    engine = fake_engine(blocks=1024)
    samples = tuple(Sample(index) for index in range(sampling.n))
    engine.add(EngineRequest("alone", tuple(tokens), sampling, samples, root=namespace_root(FINGERPRINT, "")))
    outputs: list[list[int]] = [[] for _ in samples]
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, TokenOutput):
                outputs[event.index].append(event.token_id)
    return outputs


@dataclass
class Prefilled:
    """What a Prefill stream said."""

    first: list[int] = field(default_factory=list)
    info: prefill_pb2.PrefillFirstTokens | None = None
    published: prefill_pb2.PrefillPublished | None = None
    order: list[Any] = field(default_factory=list)


@dataclass
class Decoded:
    """What a Decode stream said; `tokens` by sample."""

    started: decode_pb2.DecodeStarted | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)


class Calls:
    """`prefill` and `decode` name the parts to call."""

    def __init__(self, mesh: Mesh, prefill: str = "prefill-0", decode: str = "decode-0") -> None:
        self.mesh = mesh
        self._prefill = prefill
        self._decode = decode

    def ticket(self, tokens: Sequence[int], lease_id: str = "", ttl_ms: int = 20_000) -> KvTicket:
        """For all stores of the mesh."""
        stores = [part for part in self.mesh.parts.values() if part.role is Role.KVSTORE]
        return write_ticket(
            fingerprint=FINGERPRINT,
            salt="",
            tokens=tokens,
            layers=(0, 2),
            sources=[ChunkSource(part.name, part.address) for part in stores],
            lease_id=lease_id or f"lease-{next(_numbers)}",
            ttl_ms=ttl_ms,
        )

    @property
    def prefill_stub(self) -> Any:
        return PrefillServiceStub(self.mesh.channel(self._prefill))

    @property
    def decode_stub(self) -> Any:
        return DecodeServiceStub(self.mesh.channel(self._decode))

    async def prefill_events(
        self, tokens: Sequence[int], ticket: KvTicket | None, sampling: SamplingParams = GREEDY, **changes: Any
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        parameters, stopping = sampling_to_proto(sampling)
        request = prefill_pb2.PrefillRequest(
            request_id=changes.pop("request_id", f"request-{next(_numbers)}"),
            model=changes.pop("model", "fake"),
            fingerprint=changes.pop("fingerprint", FINGERPRINT),
            prompt_token_ids=tokens,
            sampling=parameters,
            stopping=stopping,
            eos_token_ids=sampling.eos_token_ids,
            ticket=ticket_to_proto(ticket) if ticket else None,
        )
        async with stream(self.prefill_stub.Prefill(request, timeout=changes.pop("timeout", TIMEOUT))) as call:
            async for response in call:
                yield response

    async def prefill(self, tokens: Sequence[int], ticket: KvTicket | None, *args: Any, **changes: Any) -> Prefilled:
        result = Prefilled()
        async for response in self.prefill_events(tokens, ticket, *args, **changes):
            kind = response.WhichOneof("event")
            result.order.append(kind)
            if kind == "first_tokens":
                result.info = response.first_tokens
                result.first = [batch.token_ids[0] for batch in response.first_tokens.samples]
            elif kind == "published":
                result.published = response.published
        return result

    async def decode_events(
        self,
        tokens: Sequence[int],
        samples: Sequence[Sequence[int]],
        ticket: KvTicket | None = None,
        sampling: SamplingParams = GREEDY,
        **changes: Any,
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        parameters, stopping = sampling_to_proto(sampling)
        request = decode_pb2.DecodeRequest(
            request_id=changes.pop("request_id", f"request-{next(_numbers)}"),
            model=changes.pop("model", "fake"),
            fingerprint=changes.pop("fingerprint", FINGERPRINT),
            prompt_token_ids=tokens,
            samples=[decode_pb2.DecodeSample(index=i, token_ids=output) for i, output in enumerate(samples)],
            sampling=parameters,
            stopping=stopping,
            eos_token_ids=sampling.eos_token_ids,
            ticket=ticket_to_proto(ticket) if ticket else None,
        )
        async with stream(self.decode_stub.Decode(request, timeout=changes.pop("timeout", TIMEOUT))) as call:
            async for response in call:
                yield response

    async def decode(
        self, tokens: Sequence[int], samples: Sequence[Sequence[int]], *args: Any, **changes: Any
    ) -> Decoded:
        """`tokens` of the result begin with what `samples` had; offsets are checked to have no gap."""
        result = Decoded(tokens={index: list(output) for index, output in enumerate(samples)})
        async for response in self.decode_events(tokens, samples, *args, **changes):
            result.order.append([field.name for field, _ in response.ListFields()])
            if response.HasField("started"):
                result.started = response.started
            for batch in response.samples:
                assert batch.offset == len(result.tokens[batch.index])
                result.tokens[batch.index] += batch.token_ids
                if batch.finish_reason:
                    result.finished[batch.index] = batch.finish_reason
        return result

    async def abort_prefill(self, request_id: str, ticket: KvTicket | None = None) -> bool:
        request = prefill_pb2.AbortPrefillRequest(
            request_id=request_id, ticket=ticket_to_proto(ticket) if ticket else None
        )
        return bool((await unary(self.prefill_stub.AbortPrefill(request, timeout=TIMEOUT))).aborted)

    async def abort_decode(self, request_id: str) -> bool:
        request = decode_pb2.AbortDecodeRequest(request_id=request_id)
        return bool((await unary(self.decode_stub.AbortDecode(request, timeout=TIMEOUT))).aborted)
