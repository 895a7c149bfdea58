"""Gemma 3 through GGUF: names, norms less 1, windows and both ropes survive the whole way."""

from typing import Any

import gguf
import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvmesh import hub
from kvmesh.engine.loading import load
from kvmesh.errors import InvalidArgument
from tests.unit.engine.oracle import CHUNKS, PROMPT, assert_matches, saved_model
from tests.unit.hub.gguf_files import byte_vocabulary, write_gguf

ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
SHAPE: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 20, "num_hidden_layers": 6}


def _metadata(writer: gguf.GGUFWriter) -> None:
    byte_vocabulary(writer)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_sliding_window(20)


def _capped(writer: gguf.GGUFWriter) -> None:
    _metadata(writer)
    writer.add_final_logit_softcapping(30.0)


def _converted(tmp_path, metadata=_metadata) -> tuple[Any, hub.ModelFolder]:
    oracle, _ = saved_model(
        Gemma3TextConfig, Gemma3ForCausalLM, tmp_path / "hf", norm_mean=0.0, scale=0.2, rope_parameters=ROPES, **SHAPE
    )
    tensors = {name: value.numpy() for name, value in oracle.state_dict().items() if name != "lm_head.weight"}
    write_gguf(tmp_path / "x.gguf", "gemma3", oracle.config.to_dict(), tensors, metadata=metadata)
    return oracle, hub.resolve(str(tmp_path / "x.gguf"), cache=tmp_path / "cache")


@pytest.mark.parametrize("chunks", [(PROMPT,), CHUNKS["ragged"]])
def test_logits_survive_the_whole_way(chunks, tmp_path):
    oracle, folder = _converted(tmp_path)
    model = load(folder, "float32")
    assert model.windows == (20,) * 5 + (None,)
    assert_matches(oracle, model, chunks)


def test_what_our_decoder_lacks_is_refused(tmp_path):
    _, folder = _converted(tmp_path, _capped)
    with pytest.raises(InvalidArgument, match="final_logit_softcapping"):
        load(folder, "float32")
