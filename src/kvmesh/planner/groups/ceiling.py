"""No plan of groups serves more requests/s than this: a proven bound, whatever the groups, phases and links.

Every request takes accelerator time for its prompt and for its tokens. Prompts cost at least what grows with their
length, tokens at least their share of the best batch, each in the cheapest tensor parallelism. Accelerators that divide
their time freely between both, with no queue, no pipeline and no link in the way, and that draw nothing while they do
not work, solve a linear program; its value is the bound.
"""

from __future__ import annotations

from collections import Counter
from math import inf

import numpy as np

from kvmesh.planner.latency.api import Latency
from kvmesh.planner.solver import Program
from kvmesh.planner.task import BATCHES, Task
from kvmesh.planner.world import Host


def ceiling(task: Task) -> float:
    """Requests/s."""
    program = Program()
    prefilled, decoded = program.row(lower=0.0), program.row(lower=0.0)
    drawn = program.row(upper=task.power_budget)
    kinds = Counter((_kind(host), task.factors.get(i, 1.0)) for i, host in enumerate(task.hosts))
    examples = {_kind(host): host for host in task.hosts}
    for (kind, factor), count in kinds.items():
        host = examples[kind]
        prompt, tokens = _costs(task, host)
        time = float(count * host.accelerators)
        first = program.row(upper=time)
        # Where arithmetic and memory traffic overlap, a prompt may take no time of its own beside tokens.
        apart = task.speeds.measured(host.accelerator, 1)
        second, watts = first if apart else program.row(upper=time), host.watts / host.accelerators
        program.column({prefilled: 1 / (factor * prompt), first: 1.0, drawn: watts if apart else 0.0})
        program.column({decoded: 1 / (factor * tokens), second: 1.0, drawn: watts})
    program.column({prefilled: -1.0, decoded: -1.0}, cost=1.0)
    solution = program.solve()
    return solution.objective if solution else inf


def _kind(host: Host) -> tuple[str, int, float]:
    return host.accelerator, host.accelerators, host.watts


def _costs(task: Task, host: Host) -> tuple[float, float]:
    """Accelerator seconds of a mean request's prompt and of its tokens, at least."""
    sizes = task.speeds.sizes(host.accelerator, host.accelerators)
    latencies = [(size, task.speeds.latency(host.accelerator, size)) for size in sizes]
    prompt = min(size * _prompt(task, latency) for size, latency in latencies)
    token = min(
        size * latency.decode(batch, round(batch * task.context)) / batch
        for size, latency in latencies
        for batch in BATCHES
    )
    return prompt, token * float(task.outputs.mean())


def _prompt(task: Task, latency: Latency) -> float:
    alone = latency.prefill([1])
    return max(1e-12, float(np.mean([latency.prefill([int(n)]) - alone for n in task.inputs])))
