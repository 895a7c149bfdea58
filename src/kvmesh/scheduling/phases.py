"""Which worker serves which phase: by what its process can do, and by what a plan says.

A mixed process serves whatever it is told, from one request to the next; a prefill or decode process only its own
phase. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvmesh.types import Role, WorkerInfo


@dataclass(frozen=True, slots=True)
class Phases:
    """`planned`: PREFILL, DECODE or MIXED by worker id; others serve what they can."""

    planned: Mapping[str, Role] = field(default_factory=dict)

    def of(self, worker: WorkerInfo) -> Role:
        wanted = self.planned.get(worker.worker_id, worker.role)
        return wanted if worker.role is Role.MIXED else worker.role

    def prefill(self, workers: Iterable[WorkerInfo]) -> list[WorkerInfo]:
        """Those that compute prompts for others."""
        return [worker for worker in workers if self.of(worker).prefills]

    def decode(self, workers: Iterable[WorkerInfo]) -> list[WorkerInfo]:
        """Those that generate; all that can, if the plan leaves none."""
        able = [worker for worker in workers if worker.role.decodes]
        return [worker for worker in able if self.of(worker).decodes] or able

    def unmet(self, workers: Iterable[WorkerInfo]) -> list[str]:
        """Ids of workers whose process cannot do what the plan says."""
        return [
            worker.worker_id
            for worker in workers
            if self.planned.get(worker.worker_id, worker.role) not in (worker.role, self.of(worker))
        ]
