"""The profiled token budget: the largest whole number of tiles within the target."""

import math

import pytest

from kvmesh.engine.budget import LARGEST, TILE, profiled_budget
from kvmesh.engine.fake import FakeRunner


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Timed(FakeRunner):
    """Iterations of 1 ms, and 10 us a token, on a clock of its own."""

    def __init__(self, clock, **options):
        super().__init__(**options)
        self.clock = clock

    def run(self, batch):
        self.clock.now += 1e-3 + 1e-5 * sum(len(row.token_ids) for row in batch.rows)
        return []


def budget(target, **options):
    clock = Clock()
    return profiled_budget(Timed(clock, **{"blocks": 1024, "max_model_len": 16384, **options}), target, clock)


@pytest.mark.parametrize("target", [0.003, 0.0081, 0.02, 0.0333])
def test_it_is_the_largest_that_meets_the_target(target):
    assert budget(target) == math.floor((target - 1e-3) / 1e-5 / TILE) * TILE


def test_a_target_that_nothing_meets_gives_one_tile():
    assert budget(1e-6) == TILE


@pytest.mark.parametrize(("options", "most"), [({}, LARGEST), ({"blocks": 33}, 512), ({"max_model_len": 300}, 256)])
def test_it_stays_within_pool_and_context(options, most):
    assert budget(1e9, **options) == most


def test_a_tiny_pool_is_no_trouble():
    assert budget(1e9, blocks=1) == TILE
