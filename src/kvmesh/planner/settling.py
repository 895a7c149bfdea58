"""Which of several equal hosts goes where: local search over links, after the stages of a pipeline are decided.

Stages in a row must be joined by links that carry the flow together. Where they are not, equal hosts of a region change
places, and so do whole stages of a region, as long as that adds capacity where it is lacking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmesh.planner.world import SINK, SOURCE, Problem

MAX_MOVES = 200


@dataclass(slots=True)
class Team:
    """The named hosts of a stage."""

    region: int
    layers: int
    hosts: list[int]


def settle(problem: Problem, teams: list[Team], spare: Sequence[Team], flow: float) -> None:
    """Rearranges `teams` in place; `spare` are the hosts that no stage needs."""
    search = _Settling(problem, teams, spare, flow)
    for _ in range(MAX_MOVES):
        if not any(search.improve(joint) for joint in search.lacking()):
            return


class _Settling:
    def __init__(self, problem: Problem, teams: list[Team], spare: Sequence[Team], flow: float) -> None:
        self.problem, self.teams, self.spare, self.flow = problem, teams, spare, flow

    def lacking(self) -> list[int]:
        """Joints (joint j is between teams j - 1 and j; the coordinator is at both ends) whose links fall short."""
        return [joint for joint in range(len(self.teams) + 1) if self._carried([joint]) < self.flow]

    def improve(self, joint: int) -> bool:
        """Makes the first exchange near `joint` that adds capacity."""
        return any(self._host_moves(side) or self._stage_moves(side) for side in self._sides(joint))

    def _host_moves(self, side: int) -> bool:
        mine = self.teams[side].hosts
        for i, host in enumerate(mine):
            for theirs, j, other in self._equals(side, host):
                joints = self._joints(side, other)
                before = self._carried(joints)
                mine[i], theirs[j] = theirs[j], mine[i]
                if self._carried(joints) > before:
                    return True
                mine[i], theirs[j] = theirs[j], mine[i]
        return False

    def _stage_moves(self, side: int) -> bool:
        for other, team in enumerate(self.teams):
            if team.region != self.teams[side].region or other == side:
                continue
            joints = self._joints(side, other)
            before = self._carried(joints)
            self._exchange(side, other)
            if self._carried(joints) > before:
                return True
            self._exchange(side, other)
        return False

    def _exchange(self, a: int, b: int) -> None:
        self.teams[a], self.teams[b] = self.teams[b], self.teams[a]

    def _equals(self, side: int, host: int) -> Iterator[tuple[list[int], int, int]]:
        """Places of equal hosts in other teams of the region: (hosts, index, number of the team)."""
        for number, team in enumerate([*self.teams, *self.spare]):
            if team.region == self.teams[side].region and number != side:
                for j, peer in enumerate(team.hosts):
                    if self.problem.throughput[peer] == self.problem.throughput[host]:
                        yield team.hosts, j, number

    def _joints(self, *teams: int) -> list[int]:
        """What the links of these teams can change."""
        return list({joint for team in teams if team < len(self.teams) for joint in (team, team + 1)})

    def _sides(self, joint: int) -> list[int]:
        return [team for team in (joint - 1, joint) if 0 <= team < len(self.teams)]

    def _carried(self, joints: Sequence[int]) -> float:
        """Σ min(flow, what the joint can carry)."""
        return sum(min(self.flow, self._capacity(joint)) for joint in joints)

    def _capacity(self, joint: int) -> float:
        """What the links let the hosts before the joint send, or those after it receive: the less of the two."""
        before = self._rates(joint - 1, SOURCE)
        after = self._rates(joint, SINK)
        links = self.problem.capacity
        sent = sum(min(rate, sum(links.get((u, v), 0.0) for v in after)) for u, rate in before.items())
        received = sum(min(rate, sum(links.get((u, v), 0.0) for u in before)) for v, rate in after.items())
        return min(sent, received)

    def _rates(self, team: int, end: int) -> dict[int, float]:
        """Hosts of a team, tokens/s each; beyond the ends stands the coordinator."""
        if not 0 <= team < len(self.teams):
            return {end: self.flow}
        layers = self.teams[team].layers
        return {host: self.problem.throughput[host][layers - 1] for host in self.teams[team].hosts}
