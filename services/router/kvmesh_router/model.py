"""The models that the mesh serves, as far as text is concerned.

Which there are is learnt from the workers; a model (its tokenizer and template) is loaded once, off the event
loop. Knows no placement.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvmesh.errors import InvalidArgument, KvmeshError, NotFound, Unavailable
from kvmesh.types import Role, WorkerInfo
from kvmesh_router.chat_template import ChatTemplate
from kvmesh_router.tokenizer import FAKE_EOS, FAKE_VOCABULARY, Tokenizer, fake_tokenizer

logger = logging.getLogger(__name__)

FAKE = "fake"


class Workers(Protocol):
    """What is needed of `kvmesh.registry.Directory`."""

    def workers(self, role: Role | None = None) -> list[WorkerInfo]: ...
    async def wait_for_change(self, timeout: float | None = None) -> bool: ...


@dataclass(frozen=True, slots=True)
class Model:
    """`max_model_len` is the model's own; workers may hold less."""

    name: str
    tokenizer: Tokenizer
    vocabulary_size: int
    eos_token_ids: frozenset[int]
    max_model_len: int


def load(name: str) -> Model:
    """A model by any name that `kvmesh.hub.resolve` takes, or the fake one. Blocks.

    Raises:
        Unavailable: its files cannot be used; other errors as `resolve`.
    """
    if name == FAKE:
        return Model(FAKE, fake_tokenizer(), FAKE_VOCABULARY, frozenset({FAKE_EOS}), 1 << 20)
    try:
        return _load_folder(name)
    except KvmeshError:
        raise
    except Exception as error:  # The tokenizers library raises nothing more special.
        raise Unavailable(f"the tokenizer or chat template of {name} cannot be used: {error}") from error


def _load_folder(name: str) -> Model:
    from kvmesh import hub  # Only a real model needs its libraries.

    folder = hub.resolve(name)
    template = ChatTemplate(folder.chat_template, folder.special_tokens) if folder.chat_template else None
    return Model(
        folder.name,
        Tokenizer.from_file(folder.tokenizer_path, template),
        folder.vocabulary_size,
        folder.eos_token_ids,
        folder.max_model_len,
    )


@dataclass(slots=True)
class Models:
    """`load` runs in a thread, once per model. `known` maps names that workers advertise to where to load them from."""

    directory: Workers
    load: Callable[[str], Model] = load
    known: dict[str, str] = field(default_factory=dict)
    patience: float = 3.0
    _loading: dict[str, asyncio.Task[Model]] = field(default_factory=dict)

    def served(self) -> list[str]:
        """Names of the models that some worker serves, or served."""
        return sorted({info.model for info in self.directory.workers() if info.model} | self._loading.keys())

    async def get(self, name: str | None) -> Model:
        """The model of that name, or the only one.

        Raises:
            NotFound: no such model; the message names those that are there.
            InvalidArgument: none is named and there are several.
            Unavailable: there is none at all.
        """
        if not self.served():
            await self.directory.wait_for_change(self.patience)
        chosen = self._choose(name, self.served())
        return replace(await asyncio.shield(self._load(chosen)), name=chosen)

    def _choose(self, name: str | None, served: list[str]) -> str:
        if not served:
            raise Unavailable("no worker serves any model now")
        if name is None and len(served) > 1:
            raise InvalidArgument(violations=[("model", f"must be one of {', '.join(served)}")])
        if name is not None and name not in served:
            raise NotFound(f"there is no model {name!r} here; there is {', '.join(served)}")
        return served[0] if name is None else name

    def prepare(self, workers: Iterable[WorkerInfo]) -> None:
        """Starts to load what these workers serve, so that no request has to wait for it."""
        for name in {info.model for info in workers if info.model}:
            self._load(name)

    async def preload(self, source: str) -> None:
        """Loads a model before any worker serves it."""
        model = await asyncio.to_thread(self.load, source)
        self.known[model.name] = source
        await self._load(model.name)

    def _load(self, name: str) -> asyncio.Task[Model]:
        task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self.load, self.known.get(name, name)))
            self._loading[name] = task
            task.add_done_callback(lambda done: self._loaded(name, done))
        return task

    def _loaded(self, name: str, task: asyncio.Task[Model]) -> None:
        """What failed is forgotten: the next request tries again."""
        if task.cancelled() or task.exception() is not None:
            del self._loading[name]
            logger.warning("the model %s cannot be loaded: %s", name, task.cancelled() or task.exception())


def context_of(model: Model, workers: Iterable[WorkerInfo]) -> int:
    """Tokens of prompt and output that every worker of the model can hold."""
    held = [w.capacity.max_model_len for w in workers if w.model == model.name and w.capacity.max_model_len]
    return min([model.max_model_len, *held])
