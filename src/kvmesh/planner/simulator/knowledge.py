"""What a router that has profiled its workers knows of them: lines fitted to the latency models of a deployment."""

from __future__ import annotations

from kvmesh.planner.latency.api import Latency
from kvmesh.planner.latency.fit import Fit, fit
from kvmesh.planner.simulator.deployment import Deployment
from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.predictor import Profile

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BATCHES, CONTEXTS = (1, 4, 16, 64), (256, 1024)


def profiled_fleet(deployment: Deployment) -> Fleet:
    """The fleet of a policy, with a profile for each instance; equal models are fitted once."""
    link = deployment.links.default
    transfer = (link.seconds, deployment.wire_bytes(1) / link.bytes_per_s)
    models = {id(instance.latency): instance.latency for instance in deployment.instances}
    profiles = {key: _profile(model, transfer) for key, model in models.items()}
    return Fleet(profiles={one.name: profiles[id(one.latency)] for one in deployment.instances})


def _profile(latency: Latency, transfer: tuple[float, float]) -> Profile:
    prompts = fit([(1.0, n, n * n) for n in LENGTHS], [latency.prefill([n]) for n in LENGTHS])
    steps = [(1.0, batch * context, batch) for batch in BATCHES for context in CONTEXTS]
    step = fit(steps, [latency.decode(round(batch), round(context)) for _, context, batch in steps])
    return Profile(_line(prompts), _line(step), transfer, measured=True)


def _line(found: Fit) -> tuple[float, float, float]:
    first, second, third = found.coefficients
    return first, second, third
