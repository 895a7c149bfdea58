"""From a model and texts to a profile that codes that model's KV."""

import numpy as np
import pytest
from rich.progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers

from kvmesh.engine.sensitivity import Sensitivity
from kvmesh.errors import InvalidArgument
from kvmesh.kv import bitstream
from kvmesh.kv.codecs import profile as profiles
from kvmesh.kv.codecs.cachegen import CacheGen
from kvmesh.kv.codecs.calibration import LEVELS
from kvmesh.kv.codecs.transform import Transform
from kvmesh.worker.calibration import contexts, make_profile, save, with_copy
from tests.unit.engine.tiny import VOCABULARY, tiny_model

TOKENS = 64


@pytest.fixture
def folder(tmp_path):
    """A tiny model whose tokens are words "0", "1", …"""
    path = tmp_path / "model"
    path.mkdir()
    _, folder = tiny_model("llama", path)
    words = {str(i): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder.tokenizer_path))
    return folder


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "texts"
    path.mkdir()
    for name, count in (("a.txt", 300), ("b.md", 150), ("short.txt", 10), ("c.bin", 500)):
        (path / name).write_text(" ".join(map(str, rng.integers(0, VOCABULARY, count))))
    return path


def test_passages_are_taken_from_the_files_in_turn(folder, texts):
    found = contexts(folder, texts, 100, TOKENS)
    a, b = ([int(word) for word in (texts / name).read_text().split()] for name in ("a.txt", "b.md"))
    assert found[:3] == [a[:TOKENS], b[:TOKENS], a[TOKENS : 2 * TOKENS]]
    assert len(found) == 300 // TOKENS + 150 // TOKENS
    assert contexts(folder, texts, 2, TOKENS) == found[:2]
    with pytest.raises(InvalidArgument, match="1000 tokens"):
        contexts(folder, texts, 2, 1000)


def test_a_profile_of_a_real_engine_codes_its_kv(folder, texts, tmp_path):
    passages = contexts(folder, texts, 6, TOKENS)
    profile = make_profile(folder, passages[:5], False, Progress(disable=True))
    save(profile, tmp_path / "p.kvp")
    read = profiles.read(tmp_path / "p.kvp")
    assert (read.hash, len(read.levels)) == (profile.hash, len(LEVELS))
    assert read.revision.hex() == folder.revision
    data, _ = Sensitivity(folder).compute(passages[5])
    errors, sizes = [], []
    for level in range(1, len(LEVELS) + 1):
        codec = CacheGen(read, level)
        payload = codec.encode(data, 0)[0]
        errors.append(np.abs(codec.decode([memoryview(payload)], data.shape, data.dtype, 0) - data).max())
        sizes.append(len(payload))
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert sizes[-1] < data.size
    transform = Transform(read)
    stream = bitstream.encode(data, "float32", 0, transform)
    ends = bitstream.read_header(stream).layer_ends
    errors = [np.square(bitstream.decode(stream[:end], transform).data - data).mean() for end in ends]
    assert errors[-1] < min(errors[0], 0.05 * data.var())


def test_a_quarter_of_a_passage_repeats_an_earlier_one():
    assert with_copy(range(8), 1) == [0, 1, 2, 3, 4, 5, 1, 2]
