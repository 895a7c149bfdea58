"""The story of every request in modelled time: admit → place → prefill → hand over → decode.

Discrete events on simpy. The policy is the very object that the router runs, the schedulers are the engines'; only
seconds are modelled. One thread; equal inputs give equal outcomes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf

import simpy

from kvmesh.engine.api import Admitted, Computing, TokenOutput
from kvmesh.errors import KvmeshError
from kvmesh.planner.simulator.crowd import Crowd
from kvmesh.planner.simulator.deployment import Arrival, Deployment, HandOver
from kvmesh.planner.simulator.network import Network
from kvmesh.planner.simulator.outcome import Outcome, Served
from kvmesh.planner.simulator.prompts import block_names
from kvmesh.planner.simulator.server import Server
from kvmesh.scheduling import policy as scheduling
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.policy import Decoded, Ended, Policy, Prefilled, Prompt, Slo, Transferred

Progress = Callable[[int], None]
"""Called with the number of requests that are done."""


@dataclass(slots=True)
class Journey:
    """A request under way. `waits_for` what is still missing before its KV can move: a prompt, blocks, or both."""

    number: int
    arrival: Arrival
    served: Served
    prompt: Prompt
    prefill: Assignment | None = None
    decode: Assignment | None = None
    began: float = inf
    admitted: float = inf
    cached: int = 0
    missed: bool = False
    waits_for: set[str] = field(default_factory=lambda: {"prompt", "blocks"})


class Simulation:
    """One run. It stops early once more than `allowed_misses` requests have missed an objective.

    `candidates`: how many workers of each phase, drawn at random, a policy is shown for each decision; None: all.
    """

    def __init__(
        self,
        deployment: Deployment,
        policy: Policy,
        slo: Slo,
        *,
        literal: bool = False,
        progress: Progress | None = None,
        allowed_misses: float = inf,
        candidates: int | None = None,
        seed: int = 0,
    ) -> None:
        self.deployment = deployment
        self.policy = policy
        self.slo = slo
        self.environment = simpy.Environment()
        self.network = Network(deployment.links)
        self.servers = {
            instance.name: Server(instance, self, deployment.max_waiting, literal) for instance in deployment.instances
        }
        self.crowd = Crowd([server.worker for server in self.servers.values()], candidates, seed)
        self.requests: list[Served] = []
        self.journeys: dict[str, Journey] = {}
        self.done = 0
        self.events = 0
        self._progress = progress
        self._misses_left = allowed_misses

    @property
    def now(self) -> float:
        return float(self.environment.now)

    def at(self, when: float, then: Callable[[], None]) -> None:
        """Has `then` called at `when`."""
        event = self.environment.timeout(max(0.0, when - self.now))
        event.callbacks.append(lambda _: then())
        self.events += 1

    def run(self, arrivals: Iterable[Arrival]) -> Outcome:
        """All arrivals, in order of time, to their ends."""
        began = time.perf_counter()
        self._expect(iter(arrivals))
        while self._misses_left >= 0 and self.environment.peek() < inf:
            self.environment.step()
        for journey in self.journeys.values():
            journey.served.refused = "not finished when the simulation ended"
        usages = [server.usage() for server in self.servers.values()]
        seconds = time.perf_counter() - began
        return Outcome(self.requests, usages, seconds, self.events, self.network.bytes)

    def check_integrity(self) -> list[str]:
        """Blocks and counters that were not given back; empty is good once all requests are done."""
        problems = [
            f"{name}: {text}" for name, server in self.servers.items() for text in server.engine.check_integrity()
        ]
        if not self.journeys:
            used = {name: server.engine.scheduler.pool.used for name, server in self.servers.items()}
            problems += [f"{name}: {blocks} blocks are still held" for name, blocks in used.items() if blocks]
            problems += [f"{self.policy.assigned} assignments are out"] if self.policy.assigned else []
        return problems + self.policy.check_integrity()

    # Arrival -----------------------------------------------------------------------------------------------------

    def _expect(self, arrivals: Iterator[Arrival]) -> None:
        if (arrival := next(arrivals, None)) is not None:
            self.at(arrival.at, lambda: self._arrive(arrival, arrivals))

    def _arrive(self, arrival: Arrival, later: Iterator[Arrival]) -> None:
        self._expect(later)
        number = len(self.requests)
        served = Served(arrival.at, arrival.prompt_tokens, arrival.output_tokens)
        self.requests.append(served)
        prompt = self.describe(arrival, number)
        journey = self.journeys[str(number)] = Journey(number, arrival, served, prompt)
        workers = self.crowd.some()
        if refused := self.policy.admit(workers, prompt, self.now):
            self._refuse(journey, f"refused on arrival, retry after {refused.retry_after:.1f} s")
            return
        journey.prefill = self.policy.prefill(workers, prompt, self.now)
        if journey.prefill is None:
            self._decode_locally(journey)
        else:
            self._prefill(journey, journey.prefill)

    def describe(self, arrival: Arrival, number: int) -> Prompt:
        """The request as the policy sees it."""
        return Prompt(arrival.prompt_tokens, block_names(arrival), key=number, slo=self.slo)

    def _decode_locally(self, journey: Journey) -> None:
        """The decode instance computes the prompt, in chunks beside what it decodes."""
        if server := self._choose_decode(journey, local=True):
            self._add(journey, server)

    def _prefill(self, journey: Journey, assignment: Assignment) -> None:
        server = self.servers[assignment.worker.worker_id]
        journey.served.prefill = server.instance.name
        self._add(journey, server, prefill_only=True)
        if self.deployment.hand_over is HandOver.DIRECT and not journey.served.refused:
            self._reserve(journey)

    # Hand-over ---------------------------------------------------------------------------------------------------

    def _reserve(self, journey: Journey) -> None:
        """Queues the request where it will decode; its KV moves once there are blocks and a prompt."""
        if journey.arrival.output_tokens > 1 and (server := self._choose_decode(journey, local=False)):
            self._add(journey, server, prefilled=True)

    def _choose_decode(self, journey: Journey, *, local: bool) -> Server | None:
        journey.decode = self.policy.decode(
            self.crowd.some(), journey.prompt.tokens, 1, self.now, prompt=journey.prompt, local=local
        )
        if journey.decode is None:
            self._refuse(journey, "no instance decodes")
            return None
        server = self.servers[journey.decode.worker.worker_id]
        journey.served.decode = server.instance.name
        return server

    def _arrived_half(self, journey: Journey, what: str) -> None:
        """The prompt is computed, or blocks are reserved; with both, KV moves."""
        journey.waits_for.discard(what)
        if not journey.waits_for and journey.prefill and journey.decode:
            source = self.servers[journey.prefill.worker.worker_id]
            target = self.servers[journey.decode.worker.worker_id]
            self.at(self._delivery(journey, source, target), lambda: self._delivered(journey, source, target))

    def _delivery(self, journey: Journey, source: Server, target: Server) -> float:
        """When the KV has come; streamed hand-over began with the first layer, and ends after the last."""
        deployment, served = self.deployment, journey.served
        tokens = max(0, journey.arrival.prompt_tokens - journey.cached)
        if source is target or not tokens:
            return self.now
        size = deployment.wire_bytes(tokens)
        if deployment.hand_over is HandOver.PULL:
            return self.network.transfer(source.instance, target.instance, size, self.now)
        first_layer = journey.began + (served.first_token - journey.began) / deployment.layers
        earliest = max(first_layer, journey.admitted)
        return self.network.transfer(
            source.instance, target.instance, size, earliest, served.first_token, size / deployment.layers
        )

    def _delivered(self, journey: Journey, source: Server, target: Server) -> None:
        since = max(journey.admitted, journey.served.first_token)
        self.policy.observe(Transferred(target.worker, journey.arrival.prompt_tokens, self.now - since))
        target.start(journey.number, journey.arrival.prompt_tokens)
        source.release(journey.number)

    # What servers report -----------------------------------------------------------------------------------------

    def on_admitted(self, server: Server, event: Admitted) -> None:
        """Blocks are reserved. Of a prompt that is handed over, only the receiver's count."""
        journey = self.journeys.get(event.request_id)
        if journey is None:
            return
        if server.instance.name == journey.served.decode and journey.prefill and journey.admitted == inf:
            journey.admitted, journey.cached = self.now, event.cached_tokens
            self._arrived_half(journey, "blocks")
        else:
            journey.served.hit_tokens = event.cached_tokens

    def on_computing(self, event: Computing) -> None:
        if journey := self.journeys.get(event.request_id):
            journey.began = min(journey.began, self.now)

    def on_token(self, server: Server, event: TokenOutput) -> None:
        journey = self.journeys.get(event.request_id)
        if journey is None:
            server.release(int(event.request_id))
            return
        if journey.served.first_token == inf:
            self._first_token(journey, server)
        if event.finish_reason is not None:
            self._finish(journey, server)
        elif event.last:
            self._prefilled(journey)

    def _first_token(self, journey: Journey, server: Server) -> None:
        served, now = journey.served, self.now
        served.first_token = now
        computed = served.prompt_tokens - served.hit_tokens
        self.policy.observe(Prefilled(server.worker, computed, served.hit_tokens, now - journey.began))
        for assignment in filter(None, (journey.prefill, journey.decode)):
            assignment.first_token(now)
        if journey.prefill:
            journey.prefill.finish(now, computed / max(now - journey.began, 1e-9))
        if served.ttft > self.slo.ttft:
            self._miss(journey)

    def _prefilled(self, journey: Journey) -> None:
        """The prompt waits in its blocks for whoever decodes."""
        if self.deployment.hand_over is HandOver.PULL:
            if refused := self.policy.admit(self.crowd.some(), journey.prompt, self.now, prefilled=True):
                self._refuse(journey, f"refused after its prefill, retry after {refused.retry_after:.1f} s")
                return
            self._reserve(journey)
        self._arrived_half(journey, "prompt")

    def _finish(self, journey: Journey, server: Server) -> None:
        served, now = journey.served, self.now
        served.finish = now
        if served.output_tokens > 1 and journey.decode:
            batch, context = server.load
            gained, disturbed = served.output_tokens - 1, journey.decode.disturbed
            self.policy.observe(Decoded(server.worker, gained, served.tpot, batch, context, disturbed))
        self.policy.observe(self._served(journey))
        if served.tpot > self.slo.tpot:
            self._miss(journey)
        self._leave(journey, 1 / served.tpot if served.tpot else 0.0)

    def _served(self, journey: Journey) -> scheduling.Served:
        """What a policy may learn of the whole request."""
        served = journey.served
        prefill = journey.prefill.worker if journey.prefill else None
        decode = journey.decode.worker if journey.decode else None
        return scheduling.Served(journey.prompt, prefill, decode, served.ttft, served.tpot, served.output_tokens)

    # Departure ---------------------------------------------------------------------------------------------------

    def _add(self, journey: Journey, server: Server, *, prefill_only: bool = False, prefilled: bool = False) -> None:
        try:
            server.add(journey.number, journey.arrival, prefill_only=prefill_only, prefilled=prefilled)
        except KvmeshError as error:
            self._refuse(journey, str(error))

    def _refuse(self, journey: Journey, why: str) -> None:
        journey.served.refused = why
        self._miss(journey)
        self._leave(journey, 0.0)

    def _miss(self, journey: Journey) -> None:
        """The request has missed an objective for certain."""
        self._misses_left -= not journey.missed
        journey.missed = True

    def _leave(self, journey: Journey, rate: float) -> None:
        for assignment in filter(None, (journey.prefill, journey.decode)):
            assignment.finish(self.now, rate)
        self.policy.observe(Ended(journey.prompt))
        if journey.prefill:
            self.servers[journey.prefill.worker.worker_id].release(journey.number)
        self.journeys.pop(str(journey.number), None)
        self.done += 1
        if self._progress:
            self._progress(self.done)
