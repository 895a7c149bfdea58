"""What acts on a replayed fleet: consolidation by the program of `operation`, and POLCA's caps.

Both see only what a real controller would: readings that have been taken. An instance takes `start_seconds` to wake,
in which it draws idle watts, and sleeps when its last request has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmesh.errors import InvalidArgument
from kvmesh.planner.power.fleet import Reading
from kvmesh.planner.power.instance import Instance
from kvmesh.planner.power.operation import Demand, Pool, operate
from kvmesh.planner.power.points import Limits, OperatingPoint, operating_points
from kvmesh.planner.power.profile import FULL, PowerProfile, Setting
from kvmesh.planner.world import Phase
from kvmesh.scheduling.power import Cap, Level, Row


@dataclass(frozen=True, slots=True)
class Post:
    """What an instance is to do, and at which setting."""

    setting: Setting = FULL
    phase: Phase = Phase.MIXED


@dataclass(slots=True)
class Consolidating:
    """Every `period` seconds: serve the rate of the last period and a `headroom`, with the least energy.

    Requests are taken to have the mean lengths given. `split`: some instances compute prompts, at the full clock, the
    others tokens.
    """

    profile: PowerProfile
    prompt_tokens: float
    output_tokens: float
    limits: Limits
    settings: Sequence[Setting] = (FULL,)
    headroom: float = 1.2
    period: float = 60.0
    start_seconds: float = 60.0
    split: bool = False
    _arrivals: list[int] = field(default_factory=list)
    _since: float = 0.0
    _starting: dict[int, float] = field(default_factory=dict)
    _plans: dict[float, tuple[Post, ...]] = field(default_factory=dict)

    def act(self, reading: Reading, fleet: Sequence[Instance]) -> None:
        self._arrivals.append(reading.arrivals)
        self._finish_starting(reading.time, fleet)
        if reading.time - self._since >= self.period:
            rate = sum(self._arrivals) / (reading.time - self._since)
            self._arrivals, self._since = [], reading.time
            self._switch(self.plan(rate * self.headroom, len(fleet)), reading.time, fleet)

    def plan(self, rate: float, most: int) -> tuple[Post, ...]:
        """What each instance that is to be on does; all of them everything where even those are too few."""
        rate = max(0.1, round(rate, 1))
        if rate not in self._plans:
            self._plans[rate] = self._planned(rate, most)
        return self._plans[rate]

    def _planned(self, rate: float, most: int) -> tuple[Post, ...]:
        by_name = {setting.name: setting for setting in self.settings}
        demand = Demand(rate * self.prompt_tokens, rate * self.output_tokens, self.limits.tpot)
        everything = (Post(),) * most
        try:
            choices = operate(self._pools(most), demand).choices
        except InvalidArgument:
            return everything
        posts = [
            Post(by_name[choice.point.name.rpartition(",")[0]], Phase(choice.pool))
            for choice in choices
            for _ in range(choice.on)
        ]
        return tuple(posts) if len(posts) <= most else everything

    def _pools(self, most: int) -> list[Pool]:
        if not self.split:
            return [Pool(Phase.MIXED, most, self._points(self.settings), balanced=True)]
        points = {Phase.PREFILL: self._points((FULL,)), Phase.DECODE: self._points(self.settings)}
        return [Pool(phase, most, points[phase], phase) for phase in points]

    def _points(self, settings: Sequence[Setting]) -> tuple[OperatingPoint, ...]:
        return operating_points(self.profile, self.prompt_tokens, self.limits, settings)

    def _switch(self, posts: Sequence[Post], now: float, fleet: Sequence[Instance]) -> None:
        """Prompts from the front of the fleet, everything else from its back: few change their phase or sleep."""
        prompts = [post for post in posts if not post.phase.decodes]
        others = [post for post in posts if post.phase.decodes]
        wanted = dict(enumerate(prompts)) | {len(fleet) - 1 - i: post for i, post in enumerate(others)}
        for number, instance in enumerate(fleet):
            if post := wanted.get(number):
                self._take(number, post, now, instance)
            else:
                self._starting.pop(number, None)
                instance.on = False
                instance.awake = bool(instance.requests)
        self._finish_starting(now, fleet)

    def _take(self, number: int, post: Post, now: float, instance: Instance) -> None:
        instance.setting, instance.phase = post.setting, post.phase
        if not instance.on and number not in self._starting:
            self._starting[number] = now + (0.0 if instance.awake else self.start_seconds)
            instance.awake = True

    def _finish_starting(self, now: float, fleet: Sequence[Instance]) -> None:
        for number in [number for number, ready in self._starting.items() if ready <= now]:
            fleet[number].on = True
            del self._starting[number]
        for number, instance in enumerate(fleet):
            if not instance.on and number not in self._starting and not instance.requests:
                instance.awake = False


@dataclass(slots=True)
class SimulatedActuator:
    """Caps that take `delay` seconds to show, as they do out of band."""

    fleet: Sequence[Instance]
    delay: float = 0.0
    now: float = 0.0
    _waiting: list[tuple[float, int, Cap]] = field(default_factory=list)

    def cap(self, worker: str, cap: Cap) -> None:
        self._waiting.append((self.now + self.delay, int(worker), cap))

    def tell(self, now: float) -> None:
        """Applies what is due."""
        self.now = now
        due = [entry for entry in self._waiting if entry[0] <= now]
        self._waiting = [entry for entry in self._waiting if entry[0] > now]
        for _, number, cap in due:
            instance = self.fleet[number]
            profile = instance.profile
            instance.setting = FULL if cap.clock >= 1 else profile.locked(cap.clock * profile.clock_mhz)


@dataclass(slots=True)
class Capping:
    """POLCA over the fleet; `levels` is what was decided at each reading."""

    row: Row
    actuator: SimulatedActuator
    levels: list[Level] = field(default_factory=list)

    def act(self, reading: Reading, fleet: Sequence[Instance]) -> None:
        self.actuator.tell(reading.time)
        watts = {str(number): value for number, value in enumerate(reading.watts)}
        self.levels.append(self.row.observe(watts, reading.time))
        self.actuator.tell(reading.time)
