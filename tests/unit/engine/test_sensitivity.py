"""The gradients by KV: of the KV that the engine computes, whatever its layout."""

import numpy as np
import pytest

from kvmesh.engine.batch import Batch, Row
from kvmesh.engine.build import build_runner
from kvmesh.engine.sensitivity import Sensitivity
from kvmesh.kv.codecs.rotary import Rotary
from tests.unit.engine.test_mla import saved
from tests.unit.engine.tiny import VOCABULARY, tiny_model

TOKENS = 40
WINDOW = 8


@pytest.fixture(params=["llama", "qwen3", "mistral", "v3"])
def folder(request, tmp_path):
    if request.param == "v3":
        return saved(request.param, tmp_path)[1]
    return tiny_model(request.param, tmp_path, **({"sliding_window": WINDOW} if request.param == "mistral" else {}))[1]


def text() -> list[int]:
    return np.random.default_rng(0).integers(3, VOCABULARY, TOKENS).tolist()


def test_it_judges_the_kv_that_the_engine_computes(folder):
    runner = build_runner(folder, "float32", blocks=3, device="cpu")
    runner.run(Batch((Row(text(), 0, range(3)),)))
    kv, gradients = Sensitivity(folder).compute(text())
    assert np.allclose(kv, runner.read_kv(range(3), 0, TOKENS), atol=1e-4)
    assert gradients.shape == kv.shape
    assert np.isfinite(gradients).all()
    assert (np.abs(gradients).reshape(len(kv), -1).max(axis=1) > 0).all()


def test_what_the_model_draws_depends_on_the_seed_alone(tmp_path):
    _, folder = tiny_model("llama", tmp_path)
    model = Sensitivity(folder)
    one, other = (model.compute(text(), seed)[1] for seed in (1, 1))
    assert (one == other).all()
    assert (one != model.compute(text(), 2)[1]).any()


def test_keys_turned_back_forget_where_they_were(tmp_path):
    """The first layer's key of a token, turned back, is the same at any position."""
    _, folder = tiny_model("llama", tmp_path)
    model = Sensitivity(folder)
    keys = model.compute([7] * TOKENS)[0][:1, 0]
    frequencies, start = model.rotary
    undone = Rotary(frequencies[:1], start).undo(keys, 0)
    assert np.abs(keys - keys[:, :1]).max() > 0.1
    assert np.allclose(undone, undone[:, :1], atol=1e-4)
