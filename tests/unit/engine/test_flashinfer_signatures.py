"""The stand-in for FlashInfer takes what FlashInfer takes: names and order of arguments, where it is installed."""

import inspect

import pytest

from tests.unit.engine import fake_flashinfer
from tests.unit.engine.fake_flashinfer import FakeFlashInfer

WRAPPERS = {
    "BatchDecodeWithPagedKVCacheWrapper": fake_flashinfer.DecodeWrapper,
    "BatchPrefillWithPagedKVCacheWrapper": fake_flashinfer.PrefillWrapper,
    "BatchMLAPagedAttentionWrapper": fake_flashinfer.LatentWrapper,
}
PLAN = {
    "BatchDecodeWithPagedKVCacheWrapper": ["indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads"],
    "BatchPrefillWithPagedKVCacheWrapper": [],
    "BatchMLAPagedAttentionWrapper": [],
}
OPTIONS = ["window_left", "q_data_type", "kv_data_type", "sm_scale"]


@pytest.fixture(scope="module")
def flashinfer():
    return pytest.importorskip("flashinfer")


def positional(function) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds]
    return [name for name in names if name not in ("self", "owner")]


@pytest.mark.parametrize("name", ["append_paged_kv_cache", "append_paged_mla_kv_cache", "merge_state"])
def test_functions_take_the_same_arguments(flashinfer, name):
    assert positional(getattr(flashinfer, name)) == positional(getattr(FakeFlashInfer, name))


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_planned_and_run_alike(flashinfer, name):
    real, fake = getattr(flashinfer, name), WRAPPERS[name]
    for method in ("__init__", "run", "plan"):
        expected = positional(getattr(fake, method))
        if method == "plan" and PLAN[name]:
            expected = PLAN[name]
        if method == "__init__" and name == "BatchMLAPagedAttentionWrapper":
            expected = ["float_workspace_buffer"]
        assert positional(getattr(real, method))[: len(expected)] == expected


@pytest.mark.parametrize("name", list(WRAPPERS)[:2])
def test_options_have_these_names(flashinfer, name):
    real = getattr(flashinfer, name)
    assert set(OPTIONS) <= set(inspect.signature(real.plan).parameters)
    assert "return_lse" in inspect.signature(real.run).parameters
    assert name != "BatchPrefillWithPagedKVCacheWrapper" or "causal" in inspect.signature(real.plan).parameters
