"""Loading of weights: shards, dtypes, layer ranges, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvmesh.engine.loading import load
from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.hub import ModelFolder, resolve
from tests.unit.engine.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return tiny_model("qwen3", tmp_path, head_dim=16)[1]


def weights(folder: ModelFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "model.safetensors")


def rewrite(folder: ModelFolder, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder.path / "model.safetensors")


def shard(folder: ModelFolder) -> None:
    """Splits the weights into two files with an index, as large models come."""
    tensors = weights(folder)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder.path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder.path / "model.safetensors").unlink()


def test_projections_are_fused_in_order(folder):
    tensors, layer = weights(folder), load(folder, "float32").weights.layers[1]
    prefix = "model.layers.1"
    qkv = torch.cat([tensors[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(layer.qkv.weight, qkv)
    gate_up = torch.cat([tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(layer.feed_forward.gate_up.weight, gate_up)


def test_shards_load_as_one_file_does(folder):
    whole = load(folder, "float32")
    shard(folder)
    sharded = load(resolve(str(folder.path)), "float32")
    for one, other in zip(whole.weights.layers, sharded.weights.layers, strict=True):
        assert torch.equal(one.qkv.weight, other.qkv.weight)
        assert torch.equal(one.feed_forward.down.weight, other.feed_forward.down.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_has_the_asked_dtype(folder, dtype):
    model = load(folder, dtype)
    layer = model.weights.layers[0]
    tensors = [layer.qkv.weight, layer.attention_norm, layer.q_norm, model.weights.embedding, model.weights.norm]
    assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{dtype}"}
    assert str(model.dtype) == f"torch.{dtype}"


def test_a_stage_loads_only_its_ends(folder):
    first, middle, last = (load(folder, "float32", layers=(i, i + 1)).weights for i in range(3))
    assert [first.embedding is None, middle.embedding is None, last.embedding is None] == [False, True, True]
    assert [first.head is None, middle.head is None, last.head is None] == [True, True, False]


def test_tied_embeddings_are_one_tensor(tmp_path):
    _, folder = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    loaded = load(folder, "float32").weights
    assert loaded.head is not None
    assert loaded.head.weight is loaded.embedding


def test_a_missing_tensor_is_named(folder):
    tensors = weights(folder)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    rewrite(folder, tensors)
    with pytest.raises(InvalidArgument, match=r"lack the tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        load(folder, "float32")


def test_a_tensor_of_another_shape_is_named(folder):
    tensors = weights(folder)
    tensors["model.norm.weight"] = torch.ones(3)
    rewrite(folder, tensors)
    with pytest.raises(InvalidArgument, match=r"model\.norm\.weight has shape \(3,\) instead of \(48,\)"):
        load(folder, "float32")


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder.path / "model-2.safetensors").unlink()
    with pytest.raises(NotFound, match=r"lacks the weight files model-2\.safetensors"):
        load(folder, "float32")


def test_a_truncated_file_is_refused(folder):
    file = folder.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InvalidArgument, match="not a readable safetensors file"):
        load(folder, "float32")


@pytest.mark.parametrize("layers", [(0, 4), (2, 2), (-1, 2)])
def test_layers_beyond_the_model_are_refused(folder, layers):
    with pytest.raises(InvalidArgument, match="are not within the model's 3"):
        load(folder, "float32", layers=layers)


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(InvalidArgument, match="dtype 'int3' is not supported"):
        load(folder, "int3")
