"""What the scheduler knows of a request while it lives: its group, and the sequences that compute it.

A group begins as one sequence, the trunk, that stands for all its samples. Once the prompt is computed the trunk forks
into one sequence a sample, which share the prompt's blocks::

    trunk     [ prompt ................ )
    sample 0  [ shared full blocks | partly shared: copied on first write ][ own blocks ...
    sample 1  [ shared full blocks | partly shared: copied on first write ][ own blocks ...

A trunk of a single sample never forks: it simply goes on.
"""

from __future__ import annotations

from collections import deque

from kvmesh.engine.api import EngineRequest, Sample
from kvmesh.kv.keys import chain
from kvmesh.types import BLOCK_TOKENS


class SampleState:
    """The output of one sample so far."""

    __slots__ = ("index", "output")

    def __init__(self, sample: Sample) -> None:
        self.index = sample.index
        self.output = list(sample.tokens)


class Sequence:
    """Tokens with a block table. KV of tokens [0, computed) is in `blocks`, whose first `published` have a hash."""

    __slots__ = ("blocks", "computed", "group", "hashes", "published", "samples", "tokens")

    def __init__(self, group: Group, samples: list[SampleState], tokens: list[int]) -> None:
        self.group = group
        self.samples = samples
        self.tokens = tokens
        self.computed = 0
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.published = 0

    @property
    def pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def drawing(self) -> list[SampleState]:
        """Samples that take a token when the last pending token is computed."""
        return self.samples if len(self.samples) == 1 else [sample for sample in self.samples if not sample.output]

    @property
    def reusable(self) -> int:
        """Leading tokens whose KV may come from elsewhere: all but the last, if its logits are needed."""
        return len(self.tokens) - (1 if self.drawing else 0)

    def block_hashes(self, tokens: int) -> list[bytes]:
        """Chained hashes of the full blocks among the first `tokens` tokens."""
        count = tokens // BLOCK_TOKENS
        known = len(self.hashes)
        if known < count:
            parent = self.hashes[-1] if self.hashes else self.group.request.root
            fresh = self.tokens[known * BLOCK_TOKENS : count * BLOCK_TOKENS]
            self.hashes += chain(parent, fresh, BLOCK_TOKENS)
        return self.hashes[:count]

    def fork(self, sample: SampleState) -> Sequence:
        """A sequence of one sample with this one's KV; the caller takes the references."""
        prompt = self.group.request.prompt
        child = Sequence(self.group, [sample], [*prompt, *sample.output])
        child.computed, child.blocks = self.computed, list(self.blocks)
        child.hashes, child.published = list(self.hashes), self.published
        return child


class Group:
    """One request: its live sequences, and the exports that are still due."""

    __slots__ = ("admitted", "computing", "exports", "request", "sequences")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        samples = [SampleState(sample) for sample in request.samples]
        resumed = samples[0].output if len(samples) == 1 else []
        self.sequences = [Sequence(self, samples, [*request.prompt, *resumed])]
        self.exports: deque[tuple[int, int]] = deque()
        self.admitted = False
        self.computing = False
