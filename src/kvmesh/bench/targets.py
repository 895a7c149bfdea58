"""What can be put under load: a mesh over gRPC, or a server of OpenAI's completions over HTTP.

Both are asked for exactly so many tokens, greedily, end of sequence or not: the workload is the trace's, not the
model's. Knows no clock and no workload.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvmesh.client import AsyncClient, Delta, Finish
from kvmesh.errors import Unavailable

if TYPE_CHECKING:
    from httpx2 import AsyncClient as HttpClient

_EVENT = "data: {"


@dataclass(frozen=True, slots=True)
class Message:
    """A part of an answer: so many new tokens, and how many of the prompt's were cached, once that is known."""

    tokens: int
    cached_tokens: int = 0


class Target(Protocol):
    """Streams answers; one that is left is cancelled."""

    def ask(self, prompt: Sequence[int], output_tokens: int) -> AsyncGenerator[Message]:
        """The answer to a prompt of token ids.

        Raises:
            KvmeshError: it was rejected, or it failed.
        """
        ...


class MeshTarget:
    """Implements `Target`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def ask(self, prompt: Sequence[int], output_tokens: int) -> AsyncGenerator[Message]:
        answer = self._client.generate(token_ids=prompt, max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        async with answer:
            async for event in answer:
                match event:
                    case Delta(token_ids=tokens):
                        yield Message(len(tokens))
                    case Finish(usage=usage):
                        yield Message(0, usage.cached_tokens)


class OpenAiTarget:
    """Implements `Target` on servers that take token ids and tell usage with every event, as vLLM does."""

    def __init__(self, http: HttpClient, model: str) -> None:
        self._http = http
        self._model = model

    async def ask(self, prompt: Sequence[int], output_tokens: int) -> AsyncGenerator[Message]:
        from httpx2 import HTTPError

        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        before = 0
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    raise Unavailable(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
                async for line in response.aiter_lines():
                    if line.startswith(_EVENT):
                        tokens = json.loads(line.removeprefix(_EVENT[:-1]))["usage"]["completion_tokens"]
                        yield Message(tokens - before)
                        before = tokens
        except HTTPError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
