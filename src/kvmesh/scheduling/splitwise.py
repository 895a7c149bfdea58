"""Splitwise's cluster scheduling (ISCA'24, section 4.2): two pools that join the shortest queue, and a mixed one.

The prompt's worker and the tokens' are picked together, so that KV can travel while the prompt is computed. Above a
queue threshold the mixed pool is asked, then a worker of the opposite pool is borrowed: it joins the mixed pool, does
both, and goes home when its work of the other kind is done. A worker whose process cannot change its phase is not
borrowed for prompts; as the last resort a request is computed and decoded in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain

from kvmesh.scheduling.base import FleetPolicy
from kvmesh.scheduling.load import Assignment, Load
from kvmesh.scheduling.policy import Ended, Identity, Observation, Prompt, identity
from kvmesh.types import Role, WorkerInfo

PROMPT_THRESHOLD = 8192.0
"""Pending prompt tokens above which a prompt worker is too busy (the simulator's limit)."""
TOKEN_THRESHOLD = 0.9
"""Share of KV room above which a token worker is."""
PROMPT_SHARE = 0.5
"""Of workers that can do both and were given no phase, so many serve prompts."""


@dataclass(slots=True)
class Pools:
    """Who is at home where. Workers in `lent` are in the mixed pool for the time being."""

    prompt: list[WorkerInfo]
    mixed: list[WorkerInfo]
    token: list[WorkerInfo]


@dataclass(slots=True)
class Splitwise(FleetPolicy):
    """See `policy.Policy`."""

    threshold: float = PROMPT_THRESHOLD
    _lent: dict[Identity, Role] = field(default_factory=dict)
    _paired: dict[Hashable, Identity] = field(default_factory=dict)

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        """The shortest queue of the prompt pool, then of the mixed one, then a borrowed worker; else the shortest."""
        pools = self.pools(workers)
        free = self._first([pools.prompt, pools.mixed, pools.token], now, avoid, _prompt_queue, self._prompt_free)
        token = self._token_worker(pools, prompt.tokens * prompt.samples, now, avoid)
        if token is not None and prompt.key is not None:
            self._paired[prompt.key] = identity(token)
        able = [worker for worker in [*pools.prompt, *pools.mixed, *pools.token] if worker.role.prefills]
        chosen = free or self.fleet.cheapest(able, now, avoid, _prompt_queue)
        if chosen is None:
            return None
        self._borrow(chosen, pools.token, Role.DECODE)
        work = self.fleet.estimate(chosen, prompt)
        return self.fleet.charge_prefill(chosen, prompt, now, work.tokens, work.seconds, work.hit)

    def decode(
        self,
        workers: Iterable[WorkerInfo],
        context: int,
        sequences: int,
        now: float,
        avoid: Collection[Identity] = (),
        *,
        prompt: Prompt | None = None,
        local: bool = False,
    ) -> Assignment | None:
        """The worker that was picked with the prompt's, if it may still serve; else as if picked now."""
        pool = list(workers)
        wanted = self._paired.pop(prompt.key, None) if prompt else None
        paired = next((w for w in pool if identity(w) == wanted and wanted not in avoid and w.role.decodes), None)
        chosen = paired or self._token_worker(self.pools(pool), context, now, avoid)
        return None if chosen is None else self.fleet.charge_decode(chosen, context, sequences, now, prompt, local)

    def observe(self, observation: Observation) -> None:
        FleetPolicy.observe(self, observation)
        if isinstance(observation, Ended):
            self._paired.pop(observation.prompt.key, None)

    def pools(self, workers: Iterable[WorkerInfo]) -> Pools:
        """Who serves what now; those who were lent and have no more work of the other kind are home again."""
        pools = Pools([], [], [])
        both = [worker for worker in workers if not self._place(worker, pools)]
        prompts = round(len(both) * PROMPT_SHARE)
        for number, worker in enumerate(sorted(both, key=identity)):
            home = Role.PREFILL if number < prompts else Role.DECODE
            self._settle(worker, home, pools)
        return pools

    def _place(self, worker: WorkerInfo, pools: Pools) -> bool:
        """False: the worker can do both and nobody has said what it should do."""
        phases = self.fleet.phases
        if worker.role is not Role.MIXED or worker.worker_id in phases.planned:
            self._settle(worker, phases.of(worker), pools)
            return True
        return False

    def _settle(self, worker: WorkerInfo, home: Role, pools: Pools) -> None:
        foreign = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(home)
        out = self.fleet.load(worker).assignments.values()
        if identity(worker) in self._lent and not any(one.phase is foreign for one in out):
            del self._lent[identity(worker)]
        lent = identity(worker) in self._lent or home is Role.MIXED
        (pools.mixed if lent else pools.prompt if home is Role.PREFILL else pools.token).append(worker)

    def _token_worker(self, pools: Pools, context: int, now: float, avoid: Collection[Identity]) -> WorkerInfo | None:
        """The least context of the token pool, then the mixed one, then a borrowed worker; else whoever can."""
        order = [pools.token, pools.mixed, pools.prompt]
        able = [[worker for worker in pool if worker.role.decodes] for pool in order]
        free = self._first(able, now, avoid, _context, lambda worker, load: self._roomy(worker, context))
        chosen = free or self.fleet.cheapest([*chain.from_iterable(able)], now, avoid, _context)
        if chosen is not None:
            self._borrow(chosen, pools.prompt, Role.PREFILL)
        return chosen

    def _first(
        self,
        order: list[list[WorkerInfo]],
        now: float,
        avoid: Collection[Identity],
        cost: Callable[[WorkerInfo, Load], float],
        free: Callable[[WorkerInfo, Load], bool],
    ) -> WorkerInfo | None:
        """The cheapest free worker of the first pool that has one."""
        for pool in order:
            ready = [w for w in pool if identity(w) not in avoid and free(w, self.fleet.load(w))]
            if chosen := self.fleet.cheapest(ready, now, avoid, cost):
                return chosen
        return None

    def _borrow(self, worker: WorkerInfo, opposite: Collection[WorkerInfo], home: Role) -> None:
        if worker in opposite:
            self._lent[identity(worker)] = home

    def _prompt_free(self, worker: WorkerInfo, load: Load) -> bool:
        return worker.role.prefills and load.prompt_tokens <= self.threshold

    def _roomy(self, worker: WorkerInfo, context: int) -> bool:
        capacity = worker.capacity.blocks * worker.capacity.block_tokens
        return self.fleet.room(worker) - context >= (1 - TOKEN_THRESHOLD) * capacity


def _prompt_queue(worker: WorkerInfo, load: Load) -> float:
    return load.prompt_tokens


def _context(worker: WorkerInfo, load: Load) -> float:
    return load.context_tokens
