"""Weights of GGUF files: every quantisation type, the order of rotary rows, and logits after the whole way."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from kvmesh import hub
from kvmesh.engine.batch import Batch, Draw, Row
from kvmesh.engine.build import build_runner
from kvmesh.errors import InvalidArgument
from kvmesh.hub.gguf_weights import unpermute
from kvmesh.types import SamplingParams
from tests.unit.engine.tiny import LLAMA3, tiny_model
from tests.unit.hub.gguf_files import byte_vocabulary, permute, plain, write_gguf

Kind = gguf.GGMLQuantizationType
ROW = 256


def half(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float64)


def nibbles(raw: np.ndarray) -> np.ndarray:
    return np.concatenate((raw & 15, raw >> 4), axis=-1).astype(np.float64)


def q8_0(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * block[2:].view(np.int8)


def q4_0(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * (nibbles(block[2:]) - 8)


def q4_1(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * nibbles(block[4:]) + half(block[2:4])


def fifth_bits(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, bitorder="little").astype(np.float64)


def q5_0(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * (nibbles(block[6:]) + 16 * fifth_bits(block[2:6]) - 16)


def q5_1(block: np.ndarray) -> np.ndarray:
    return half(block[:2]) * (nibbles(block[8:]) + 16 * fifth_bits(block[4:8])) + half(block[2:4])


def q4_k(block: np.ndarray) -> np.ndarray:
    """ggml's dequantize_row_q4_K."""
    return k_groups(block, block[16:], np.zeros(32, np.uint8))


def q5_k(block: np.ndarray) -> np.ndarray:
    """ggml's dequantize_row_q5_K."""
    return k_groups(block, block[48:], block[16:48])


def k_groups(block: np.ndarray, quants: np.ndarray, fifth: np.ndarray) -> np.ndarray:
    """One group of 32 after the other, with get_scale_min_k4; bit j of `fifth` is the fifth of group j."""
    d, least, packed = half(block[:2]), half(block[2:4]), block[4:16].astype(int)
    values = []
    for j in range(8):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        group = quants[32 * (j // 2) : 32 * (j // 2) + 32]
        low = (group >> 4) if j % 2 else (group & 15)
        values.append(d * scale * (low + 16.0 * (fifth >> j & 1)) - least * minimum)
    return np.concatenate(values)


def q6_k(block: np.ndarray) -> np.ndarray:
    """ggml's dequantize_row_q6_K, one value after the other."""
    low, high, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), half(block[208:])
    values = np.zeros(256)
    for n in range(2):
        for i in range(32):
            for part in range(4):
                nibble = low[64 * n + 32 * (part % 2) + i] >> (4 * (part // 2)) & 15
                quant = int(nibble | (high[32 * n + i] >> (2 * part) & 3) << 4) - 32
                scale = int(scales[8 * n + 2 * part + i // 16])
                values[128 * n + 32 * part + i] = d[0] * scale * quant
    return values


REFERENCE = {
    Kind.Q8_0: q8_0, Kind.Q4_0: q4_0, Kind.Q4_1: q4_1, Kind.Q5_0: q5_0, Kind.Q5_1: q5_1,
    Kind.Q4_K: q4_k, Kind.Q5_K: q5_k, Kind.Q6_K: q6_k,
}  # fmt: skip
HALVES = {
    Kind.Q8_0: [0], Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q5_0: [0], Kind.Q5_1: [0, 2],
    Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2], Kind.Q6_K: [208],
}  # fmt: skip
CONFIG = {
    "num_hidden_layers": 1, "max_position_embeddings": 64, "hidden_size": ROW, "intermediate_size": ROW,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip


def random_blocks(kind: Kind, rows: int, seed: int) -> np.ndarray:
    """Rows of random bytes, but with scales that are reasonable half floats."""
    items, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, ROW // items, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = generator.normal(0, 0.1, (rows, ROW // items, 1)).astype(np.float16)
        blocks[..., at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def convert(tmp_path, tensors, encode=plain, architecture="llama", config=CONFIG, metadata=None) -> hub.ModelFolder:
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, config, tensors, encode, metadata)
    return hub.resolve(str(path), cache=tmp_path / "cache")


@pytest.mark.parametrize("kind", REFERENCE, ids=lambda kind: kind.name)
def test_quantised_blocks_become_the_floats_of_ggml(kind, tmp_path):
    raw = random_blocks(kind, rows=6, seed=kind.value)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    expected = np.concatenate([REFERENCE[kind](block) for block in raw.reshape(-1, size)]).reshape(6, ROW)
    tensors = {"model.embed_tokens.weight": np.zeros((9, ROW), np.float32), "model.layers.0.mlp.down_proj.weight": raw}
    folder = convert(
        tmp_path, tensors, lambda name, v: (v, kind) if name == "blk.0.ffn_down.weight" else plain(name, v)
    )
    values = load_file(folder.path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, "float16"), (Kind.F32, "float32")])
def test_floats_stay_as_they_are(kind, dtype, tmp_path):
    values = np.random.default_rng(0).normal(size=(9, ROW)).astype(dtype)
    folder = convert(tmp_path, {"model.embed_tokens.weight": values}, lambda name, v: (v, kind))
    assert np.array_equal(load_file(folder.path / "model.safetensors")["model.embed_tokens.weight"], values)


def test_bfloat16_stays_as_it_is(tmp_path):
    from safetensors.torch import load_file as load_torch

    values = torch.randn(9, ROW).bfloat16()
    raw = values.view(torch.int16).numpy().view(np.uint8)
    folder = convert(tmp_path, {"model.embed_tokens.weight": raw}, lambda name, v: (v, Kind.BF16))
    assert torch.equal(load_torch(folder.path / "model.safetensors")["model.embed_tokens.weight"], values)


@pytest.mark.parametrize("shape", [(48, 5), (48,)])
def test_unpermute_undoes_what_llama_cpp_does(shape):
    rows = np.arange(np.prod(shape)).reshape(shape)
    assert not np.array_equal(permute(rows, 6), rows)
    assert np.array_equal(unpermute(permute(rows, 6), 6), rows)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("llama", {"attention_bias": True, "head_dim": 16}),
     ("qwen2", {}), ("qwen3", {"head_dim": 16, "tie_word_embeddings": True})],
)  # fmt: skip
def test_logits_survive_the_whole_way(architecture, overrides, tmp_path):
    """transformers' model → GGUF as llama.cpp writes it → our folder → our runner."""
    oracle, _ = tiny_model(architecture, tmp_path / "hf", rope_parameters={"rope_theta": 500.0}, **overrides)
    tensors = {name: value.numpy() for name, value in oracle.state_dict().items()}
    if oracle.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config = oracle.config.to_dict() | {"head_dim": overrides.get("head_dim")}
    folder = convert(tmp_path, tensors, architecture=architecture, config=config, metadata=with_theta(500.0))
    assert next_token_logprobs(folder) == pytest.approx(oracle_logprobs(oracle), abs=1e-4)


def test_llama3_frequency_factors_become_rope_scaling(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    oracle, _ = tiny_model("llama", tmp_path / "hf", rope_parameters=scaling, head_dim=64)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](oracle.config, "cpu")[0].numpy()
    factors = (500000.0 ** (-np.arange(0, 64, 2) / 64) / scaled).astype(np.float32)
    tensors = {name: value.numpy() for name, value in oracle.state_dict().items()}

    def metadata(writer):
        with_theta(500000.0)(writer)
        writer.add_tensor("rope_freqs.weight", factors)

    folder = convert(tmp_path, tensors, config=oracle.config.to_dict(), metadata=metadata)
    assert folder.config["rope_scaling"]["factor"] == pytest.approx(8.0)
    assert next_token_logprobs(folder) == pytest.approx(oracle_logprobs(oracle), abs=1e-4)


def with_theta(theta: float):
    def metadata(writer: gguf.GGUFWriter) -> None:
        byte_vocabulary(writer)
        writer.add_rope_freq_base(theta)

    return metadata


PROMPT = [5, 17, 40, 2, 61, 33, 9, 9, 70, 12]


def next_token_logprobs(folder: hub.ModelFolder) -> dict[int, float]:
    """The 20 most probable tokens after PROMPT."""
    draw = Draw(SamplingParams(max_tokens=1, logprobs=20, temperature=0.0), 0, 0, (), ())
    [[sampled]] = build_runner(folder, "float32", blocks=2, device="cpu").run(Batch((Row(PROMPT, 0, [1], (draw,)),)))
    return {top.token_id: top.logprob for top in sampled.logprobs.top}


def oracle_logprobs(oracle) -> dict[int, float]:
    with torch.inference_mode():
        best = oracle(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).topk(20)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@pytest.mark.parametrize(
    ("architecture", "tensors", "encode", "message"),
    [
        ("gemma2", {}, plain, "architecture 'gemma2' is not supported"),
        ("llama", {}, lambda name, v: (v.astype(np.int32), Kind.I32), "tensors of type I32; supported are F32"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(architecture, tensors, encode, message, tmp_path):
    embedding = {"model.embed_tokens.weight": np.zeros((9, ROW), np.float32)}
    with pytest.raises(InvalidArgument, match=message):
        convert(tmp_path, embedding | tensors, encode, architecture)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(InvalidArgument, match="not a readable GGUF file"):
        hub.resolve(str(tmp_path / "x.gguf"), cache=tmp_path / "cache")
