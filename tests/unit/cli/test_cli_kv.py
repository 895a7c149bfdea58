"""`kvmesh kv calibrate` and `kvmesh up --codec`: what reaches the processes that do the work."""

import pytest

from kvmesh.cli.main import execute

CALIBRATE = ["kv", "calibrate", "--model"]


def test_there_is_nothing_to_learn_of_a_fake_model(tmp_path, capsys):
    assert execute([*CALIBRATE, "fake", "--text", str(tmp_path)]) == 1
    assert "noise" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--text", "nowhere"], ["--text", ".", "--contexts", "0"], []])
def test_bad_usage(arguments, capsys):
    assert execute([*CALIBRATE, "m", *arguments]) == 2
    assert capsys.readouterr().err.startswith("kvmesh: ")


def test_an_unknown_model_is_one_sentence(tmp_path, capfd):
    assert execute([*CALIBRATE, "no-such-model", "--text", str(tmp_path)]) == 1
    assert "there is no model 'no-such-model'" in capfd.readouterr().err


def test_what_the_child_says_is_the_answer(tmp_path, capfd):
    """A folder that passes for a model, without texts: the process that would run it refuses."""
    model, texts = tmp_path / "model", tmp_path / "texts"
    for folder in (model, texts):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(8))
    (model / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    )
    assert execute([*CALIBRATE, str(model), "--text", str(texts)]) == 1
    assert "file in" in capfd.readouterr().err
