"""Vocabularies of GGUF files against the tokenizers they came from."""

import json

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kvmesh import hub
from kvmesh.errors import InvalidArgument
from tests.unit.hub.gguf_files import byte_vocabulary, write_gguf

CORPUS = [
    "The quick brown fox jumps over the lazy dog 12345 times, doesn't it? def f(x): return x ** 2024\n\n",
    "Ну что, наивный мир? 日本語のテキスト。 naïve café 🙂 don't we'll I'm\t\ttabs   spaces\r\n",
] * 20
TEXTS = [
    "Hello world",
    "in 2024 there were 1234567 cases",
    "don't WE'LL",
    "  leading and  double  spaces ",
    "日本語 🙂 naïve",
    "tabs\t\tand\nnewlines\n\n",
    "x=1;y=22",
    "",
    "e\u0301 decomposed",
    "<|user|>hi<|end|>",
]
# As in the tokenizer.json of Llama 3 and of Qwen2.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(split: str | None, digits: bool) -> Tokenizer:
    """A byte-level BPE trained here, with two control tokens."""
    parts = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    parts += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=not split)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|user|>", "<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def gguf_folder(tmp_path, metadata) -> hub.ModelFolder:
    config = {
        "num_hidden_layers": 1, "max_position_embeddings": 64, "hidden_size": 8, "intermediate_size": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    path = tmp_path / "vocabulary.gguf"
    write_gguf(path, "llama", config, {"model.embed_tokens.weight": np.zeros((9, 8), np.float32)}, metadata=metadata)
    return hub.resolve(str(path), cache=tmp_path / "cache")


def vocabulary_of(tokenizer: Tokenizer, pre: str):
    """The metadata that llama.cpp writes for a byte-level tokenizer."""
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(False)

    return metadata


@pytest.mark.parametrize(
    ("pre", "split", "digits"),
    [
        ("smollm", None, True),
        ("default", None, False),
        ("llama-bpe", LLAMA3_SPLIT, False),
        ("qwen2", QWEN2_SPLIT, False),
    ],
)
def test_byte_level_vocabularies_encode_as_the_original(pre, split, digits, tmp_path):
    original = byte_level(split, digits)
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    folder = gguf_folder(tmp_path, vocabulary_of(original, pre))
    converted = Tokenizer.from_file(str(folder.tokenizer_path))
    for text in TEXTS:
        ids = converted.encode(text).ids
        assert ids == original.encode(text).ids
        decoded = converted.decode(ids, skip_special_tokens=False)
        assert decoded == (normalizers.NFC().normalize_str(text) if pre == "qwen2" else text)


def test_control_tokens_are_special(tmp_path):
    folder = gguf_folder(tmp_path, vocabulary_of(byte_level(None, True), "smollm"))
    tokenizer = Tokenizer.from_file(str(folder.tokenizer_path))
    assert tokenizer.encode("<|user|>").ids == [0]
    assert tokenizer.decode(tokenizer.encode("<|user|>hi<|end|>").ids) == "hi"


def test_the_folder_knows_its_special_tokens_and_template(tmp_path):
    folder = gguf_folder(tmp_path, byte_vocabulary)
    assert folder.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert folder.eos_token_ids == {1}
    assert folder.chat_template == "{{ messages[0]['content'] }}"


def test_an_end_of_turn_ends_an_answer_too(tmp_path):
    def metadata(writer):
        byte_vocabulary(writer)
        writer.add_eot_token_id(4)

    assert gguf_folder(tmp_path, metadata).eos_token_ids == {1, 4}


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    pieces = ["▁hello", "▁hell", "llo", "lo", "ll", "▁h", "el", "▁", "h", "e", "l", "o"]
    scores = [-1.0, -9.0, -7.0, -3.0, -6.0, -2.0, -4.0, -20.0, -21.0, -22.0, -23.0, -24.0]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + scores)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    """Merging the best pair first ends at three pieces, though the whole word is in the vocabulary."""
    tokenizer = Tokenizer.from_file(str(gguf_folder(tmp_path, sentencepiece).tokenizer_path))
    assert tokenizer.encode("hello").tokens == ["<s>", "▁h", "el", "lo"]
    assert tokenizer.encode("hé", add_special_tokens=False).tokens == ["▁h", "<0xC3>", "<0xA9>"]
    for text in ("hello", "hello ü 🙂", " hello  hello"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_tokenizer_model("wordpiece"), "vocabulary 'wordpiece' is not supported"),
        (lambda w: (byte_vocabulary(w), w.add_key_value("tokenizer.ggml.pre", "odd", gguf.GGUFValueType.STRING)),
         "pre-tokeniser 'odd' is not supported"),
    ],
)  # fmt: skip
def test_unknown_vocabularies_are_refused(change, message, tmp_path):
    def metadata(writer):
        change(writer)
        if writer.kv_data[-1].get("tokenizer.ggml.tokens") is None:
            writer.add_token_list(["a"])

    with pytest.raises(InvalidArgument, match=message):
        gguf_folder(tmp_path, metadata)
