"""What the scheduler knows of a request while it lives: its group, and the sequences that compute it.

A group begins as one sequence, the trunk, that stands for all its samples. Once the prompt is computed the trunk forks
into one sequence a sample, which share the prompt's blocks::

    trunk     [ prompt ................ )
    sample 0  [ shared full blocks | partly shared: copied on first write ][ own blocks ...
    sample 1  [ shared full blocks | partly shared: copied on first write ][ own blocks ...

A trunk of a single sample never forks: it simply goes on. In a beam search the trunk forks into the beams, and from
then on each step makes the next beams as forks of those before them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kvmesh.engine.api import EngineRequest, KvArray, Sample
from kvmesh.engine.beam import Beam, BeamSearch
from kvmesh.kv.keys import chain
from kvmesh.types import BLOCK_TOKENS, TokenLogprob


class SampleState:
    """The output of one sample so far."""

    __slots__ = ("index", "output")

    def __init__(self, sample: Sample) -> None:
        self.index = sample.index
        self.output = list(sample.tokens)


@dataclass(slots=True)
class Saved:
    """KV of the first `tokens` tokens, once the engine has copied it; the scheduler only counts it."""

    tokens: int
    data: KvArray | None = None


class Sequence:
    """Tokens with a block table. KV of tokens [0, computed) is in `blocks`, whose first `published` have a hash.

    `likeliest`: of a beam whose tokens are all computed, what may follow. `saved`: of a preempted sequence, the KV of
    its first tokens in host memory.
    """

    __slots__ = ("blocks", "computed", "group", "hashes", "likeliest", "published", "samples", "saved", "tokens")

    def __init__(self, group: Group, samples: list[SampleState], tokens: list[int]) -> None:
        self.group = group
        self.samples = samples
        self.tokens = tokens
        self.computed = 0
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.published = 0
        self.likeliest: tuple[TokenLogprob, ...] = ()
        self.saved: Saved | None = None

    @property
    def slots(self) -> int:
        """Samples or beams that it stands for."""
        is_trunk = len(self.group.sequences) == 1
        return self.group.request.sampling.beam_width if self.group.beams and is_trunk else len(self.samples)

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

    def follow(self, beam: Beam, number: int) -> Sequence:
        """The beam of that number, which goes on from this one; the caller takes the references."""
        return self.fork(SampleState(Sample(number, tuple(token.token_id for token in beam.tokens))))


class Group:
    """One request: its live sequences, and the exports that are still due. `beams`: its beam search, if it is one."""

    __slots__ = ("admitted", "beams", "computing", "exports", "longest", "request", "sequences")

    def __init__(self, request: EngineRequest, longest: int) -> None:
        self.request = request
        self.longest = longest
        self.beams: BeamSearch | None = None
        self.sequences = [self._beam_trunk() if request.sampling.beam_width else self._trunk()]
        self.exports: deque[tuple[int, int]] = deque()
        self.admitted = False
        self.computing = False

    def restart(self) -> Sequence:
        """Begins a beam search anew: it holds no block any more."""
        self.sequences = [self._beam_trunk()]
        return self.sequences[0]

    def _trunk(self) -> Sequence:
        samples = [SampleState(sample) for sample in self.request.samples]
        resumed = samples[0].output if len(samples) == 1 else []
        return Sequence(self, samples, [*self.request.prompt, *resumed])

    def _beam_trunk(self) -> Sequence:
        self.beams = BeamSearch(self.request.sampling, self.longest)
        return Sequence(self, [SampleState(Sample(0))], list(self.request.prompt))
