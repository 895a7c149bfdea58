"""best_of: the likeliest samples, renumbered, with nothing of the others."""

from kvmesh.types import FinishReason, PositionLogprobs, TokenLogprob
from kvmesh_router.best_of import BestOf
from kvmesh_router.events import Choice, Delta


def delta(index, text, *logprobs):
    positions = tuple(PositionLogprobs(TokenLogprob(7, value)) for value in logprobs)
    return Delta(index, len(positions), text, (7,) * len(positions), positions)


def choice(index):
    return Choice(index, FinishReason.STOP, 1)


def test_the_likeliest_by_mean_come_first():
    best = BestOf(2, logprobs=True)
    for held in (delta(0, "a", -3.0), delta(1, "b", -1.0, -1.0), delta(2, "c", -0.5), delta(1, "B", -1.0)):
        best.hold(held)
    deltas, choices = best.best(map(choice, range(3)))
    assert [(d.index, d.text) for d in deltas] == [(0, "c"), (1, "b"), (1, "B")]
    assert [c.index for c in choices] == [0, 1]
    assert deltas[0].logprobs[0].chosen.logprob == -0.5


def test_log_probabilities_that_nobody_asked_for_stay_here():
    best = BestOf(1, logprobs=False)
    best.hold(delta(0, "a", -1.0))
    assert best.best([choice(0)])[0][0].logprobs == ()


def test_a_sample_without_a_token_is_the_last_choice():
    best = BestOf(1, logprobs=False)
    best.hold(delta(1, "b", -9.0))
    assert best.best([choice(0), choice(1)])[0][0].text == "b"
