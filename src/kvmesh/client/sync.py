"""The synchronous client: `AsyncClient` on an event loop in a thread of its own.

Holds no logic of the protocol. Safe to call from several threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

from kvmesh.client.aio import AsyncClient, AsyncStream
from kvmesh.client.events import Completion, Event, ModelInfo, WorkerStatus
from kvmesh.client.requests import Message, Options
from kvmesh.loop import new_event_loop

T = TypeVar("T")
CANCEL_TIMEOUT = 2.0


class _Job(Generic[T]):
    """Work on the loop that can be interrupted at any moment.

    Ctrl-C may come between two statements: before there is a task to cancel, or in the locks of a future, which would
    stay locked. A SimpleQueue has none that an interrupt could leave behind.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        self.outcome: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def start(self) -> None:
        """In the loop's thread, as `cancel`."""
        if not self._cancelled:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def cancel(self) -> None:
        self._cancelled = True
        if self._task is None:
            self.outcome.put((None, asyncio.CancelledError()))
        else:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self.outcome.put((await self._work(), None))
        except BaseException as error:
            self.outcome.put((None, error))


class _LoopThread:
    """An event loop that runs coroutines for other threads."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvmesh-client", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Waits for `work`, called in the loop's thread; interrupted (Ctrl-C), that has ended before this raises."""
        job = _Job(work)
        try:
            self._loop.call_soon_threadsafe(job.start)
            result, error = job.outcome.get()
        except BaseException:
            self._loop.call_soon_threadsafe(job.cancel)
            with suppress(Empty):
                job.outcome.get(timeout=CANCEL_TIMEOUT)
            raise
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def close(self) -> None:
        self.run(lambda: self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Stream:
    """The events of one generation; leaving the context, or close(), cancels it."""

    def __init__(self, loop: _LoopThread, stream: AsyncStream) -> None:
        self._loop = loop
        self._stream = stream
        self.request_id = stream.request_id

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return self._loop.run(lambda: self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run(lambda: self._stream.__aexit__(None, None, None))

    def abort(self) -> bool:
        """As AsyncStream.abort."""
        return self._loop.run(lambda: self._stream.abort())


class Client:
    """As AsyncClient, without async.

    ::

        with Client("127.0.0.1:50051") as client:
            print(client.complete("Once upon a time", max_tokens=32).text)
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._loop = _LoopThread()
        self._client = self._loop.run(lambda: _connect(address))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run(lambda: self._client.close())
        self._loop.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        chat: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """As AsyncClient.generate."""
        stream = self._client.generate(prompt, chat=chat, token_ids=token_ids, timeout=timeout, **options)
        return Stream(self._loop, stream)

    def complete(
        self,
        prompt: str | None = None,
        *,
        chat: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """As AsyncClient.complete."""
        work = self._client.complete(prompt, chat=chat, token_ids=token_ids, timeout=timeout, **options)
        return self._loop.run(lambda: work)

    def abort(self, request_id: str) -> bool:
        """As AsyncClient.abort."""
        return self._loop.run(lambda: self._client.abort(request_id))

    def models(self, model: str | None = None) -> list[ModelInfo]:
        """As AsyncClient.models."""
        return self._loop.run(lambda: self._client.models(model))

    def status(self, check: bool = False) -> list[WorkerStatus]:
        """As AsyncClient.status."""
        return self._loop.run(lambda: self._client.status(check))


async def _connect(address: str) -> AsyncClient:
    """Built inside the loop that will use it."""
    return AsyncClient(address)
