"""Names, folders, the cache and progress."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvmesh import hub
from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.hub.cache import build_once
from kvmesh.hub.progress import watch
from tests.unit.hub.gguf_files import write_gguf

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "max_position_embeddings": 64, "hidden_size": 8, "vocab_size": 9,
    "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
}  # fmt: skip


def write_folder(path: Path, **config) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file({"w": np.arange(9000, dtype=np.float32)}, path / "model.safetensors")
    return path


def write_file(path: Path) -> Path:
    write_gguf(path, "llama", CONFIG, {"model.embed_tokens.weight": np.ones((9, 8), np.float32)})
    return path


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int | None]] = []

    def __call__(self, description: str, completed: int, total: int | None) -> None:
        self.calls.append((description, completed, total))


# Resolving


def test_a_folder_is_used_in_place(tmp_path):
    folder = hub.resolve(str(write_folder(tmp_path / "m")), cache=tmp_path / "cache")
    assert (folder.name, folder.path, folder.max_model_len, folder.vocabulary_size) == ("m", tmp_path / "m", 64, 9)
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path):
    file, cache, progress = write_file(tmp_path / "tiny.gguf"), tmp_path / "cache", Recorder()
    first = hub.resolve(str(file), cache, progress)
    assert progress.calls[0] == ("Reading tiny.gguf", 0, None)
    assert progress.calls[-1] == ("Dequantising tensors", 1, 1)
    second = hub.resolve(str(file), cache, again := Recorder())
    assert (second.path, again.calls) == (first.path, [])
    file.write_bytes(file.read_bytes() + b"\0" * 32)
    assert hub.resolve(str(file), cache).path != first.path


def test_a_folder_with_just_a_gguf_file_is_that_file(tmp_path):
    (tmp_path / "m").mkdir()
    write_file(tmp_path / "m" / "tiny.gguf")
    assert hub.resolve(str(tmp_path / "m"), tmp_path / "cache").vocabulary_size == 9


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", "no model 'no-such-model'.*smollm2-135m-instruct"),
        ("", "no model ''"),
        ("missing.gguf", "no file missing.gguf"),
        ("a/b/c", "no model 'a/b/c'"),
    ],
)
def test_unknown_models_are_not_found(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=message):
        hub.resolve(model, cache=tmp_path / "cache")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_not_a_model(missing, tmp_path):
    (write_folder(tmp_path) / missing).unlink()
    with pytest.raises(NotFound, match="is not a model folder"):
        hub.resolve(str(tmp_path))


def test_broken_json_is_named(tmp_path):
    (write_folder(tmp_path) / "config.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"config\.json is not valid JSON"):
        _ = hub.resolve(str(tmp_path)).config


def test_the_catalogue_and_the_cache_are_listed(tmp_path):
    known = [hub.DEFAULT_MODEL, "gemma-3-270m"]
    assert [(m.name, m.path, m.size_bytes) for m in hub.list_models(tmp_path)] == [(name, None, 0) for name in known]
    write_folder(tmp_path / hub.DEFAULT_MODEL)
    write_folder(tmp_path / "some--other")
    names = {model.name: model.path for model in hub.list_models(tmp_path)}
    cached = {hub.DEFAULT_MODEL: tmp_path / hub.DEFAULT_MODEL, "some/other": tmp_path / "some--other"}
    assert names == dict.fromkeys(known) | cached
    assert hub.pull(cache=tmp_path).path == tmp_path / hub.DEFAULT_MODEL


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.default_cache() == tmp_path / "kvmesh" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.default_cache() == Path.home() / ".cache" / "kvmesh" / "models"


# The cache


def test_only_one_of_many_builds(tmp_path):
    built, ready = [], threading.Barrier(4)

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("whole")

    def run() -> None:
        ready.wait()
        assert (build_once(tmp_path / "target", build) / "file").read_text() == "whole"

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_failed_build_leaves_nothing_and_can_be_tried_again(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(tmp_path / "target", fail)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert build_once(tmp_path / "target", lambda folder: None).is_dir()


def test_a_growing_folder_is_reported(tmp_path):
    seen = threading.Event()

    class Watcher(Recorder):
        def __call__(self, description: str, completed: int, total: int | None) -> None:
            super().__call__(description, completed, total)
            if completed == 700:
                seen.set()

    with watch(tmp_path, "Fetching", 1000, progress := Watcher()):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "part").write_bytes(b"x" * 700)
        assert seen.wait(10)
    assert progress.calls[0] == ("Fetching", 0, 1000)
    assert progress.calls[-1] == ("Fetching", 1000, 1000)


# What a folder knows


def test_the_revision_identifies_weights_and_configuration(tmp_path):
    folders = [write_folder(tmp_path / name) for name in "abcd"]
    write_folder(folders[1], rope_theta=7.0)
    save_file({"w": np.arange(9001, dtype=np.float32)}, folders[2] / "model.safetensors")
    weights = folders[3] / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[20000] ^= 1
    weights.write_bytes(changed)
    revisions = [hub.ModelFolder(path.name, path).revision for path in folders]
    assert len(set(revisions)) == 4
    copy = hub.ModelFolder("other name", write_folder(tmp_path / "copy"))
    assert copy.revision == revisions[0]


def test_the_layout_tells_apart_what_may_not_share_kv(tmp_path):
    folder = hub.ModelFolder("m", write_folder(tmp_path / "m"))
    layout = folder.layout("float32")
    assert (layout["kv_heads"], layout["head_dim"], layout["layers"], layout["tokenizer"]) == ("1", "4", "1", "none")
    assert all(isinstance(value, str) for value in layout.values())
    assert folder.layout("bfloat16") == layout | {"dtype": "bfloat16"}
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert hub.ModelFolder("m", tmp_path / "m").layout("float32")["tokenizer"] != "none"
    with pytest.raises(InvalidArgument, match="dtype 'auto'"):
        folder.layout("auto")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": [1, 2]}, {"eos_token_id": 3}, {1, 2}), (None, {"eos_token_id": 3}, {3}), (None, {}, set())],
)
def test_end_tokens_come_from_the_generation_config_first(generation, config, expected, tmp_path):
    write_folder(tmp_path, **config)
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert hub.ModelFolder("m", tmp_path).eos_token_ids == expected


def test_chat_templates_are_found_wherever_they_are(tmp_path):
    write_folder(tmp_path)
    assert hub.ModelFolder("m", tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "eos_token": {"content": "E"}}))
    assert hub.ModelFolder("m", tmp_path).chat_template == "d"
    assert hub.ModelFolder("m", tmp_path).special_tokens == {"eos_token": "E"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert hub.ModelFolder("m", tmp_path).chat_template == "file"
