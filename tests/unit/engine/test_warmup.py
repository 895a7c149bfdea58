"""Warming up changes nothing that a request could see."""

from kvmesh.engine.api import EngineRequest, TokenOutput
from kvmesh.engine.fake import FakeRunner, fake_engine
from kvmesh.engine.warmup import PROMPT_TOKENS, warm_up
from kvmesh.types import SamplingParams


def tokens(engine):
    engine.add(EngineRequest("r", tuple(range(50)), SamplingParams(max_tokens=12)))
    return [event.token_id for _ in range(13) for event in engine.step() if isinstance(event, TokenOutput)]


def test_requests_get_the_same_tokens_from_a_clean_pool():
    warm = fake_engine()
    kv = warm_up(warm.runner)
    assert kv.shape == warm.layout.chunk_shape(PROMPT_TOKENS)
    assert kv.any()
    assert tokens(warm) == tokens(fake_engine())
    assert warm.check_integrity() == []
    assert warm.statistics().blocks_used == 0


def test_a_pool_or_context_too_small_is_left_alone():
    assert warm_up(FakeRunner(blocks=2)) is None
    assert warm_up(FakeRunner(max_model_len=PROMPT_TOKENS)) is None
