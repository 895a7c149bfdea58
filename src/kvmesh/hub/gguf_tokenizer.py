"""From GGUF vocabularies to `tokenizer.json`: byte-level BPE ("gpt2") and SentencePiece BPE ("llama")."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kvmesh.errors import InvalidArgument
from kvmesh.hub.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe")
_QWEN = ("qwen2", "deepseek-r1-qwen")
_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_PLAIN = ("default", "gpt-2", "gpt2")


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """The tokenizer that the file describes.

    Raises:
        InvalidArgument: a vocabulary or pre-tokeniser of an unknown kind.
    """
    kind = file.require("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise InvalidArgument(f"the GGUF vocabulary {kind!r} is not supported; supported are gpt2 and llama")
    tokenizer = _byte_level(file) if kind == "gpt2" else _sentencepiece(file)
    _add_special(tokenizer, file)
    if adds_bos(file):
        _prepend_bos(tokenizer, file)
    return tokenizer


def adds_bos(file: GgufFile) -> bool:
    """True if text begins with the token `bos`: what the file says, else what llama.cpp does."""
    kind, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    return bool(file.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA3))


def tokenizer_config_of(file: GgufFile) -> dict[str, Any]:
    """`tokenizer_config.json`: special tokens by text, and the chat template."""
    tokens = file.require("tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: file.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.hyperparameter("context_length"),
        "add_bos_token": adds_bos(file),
        "clean_up_tokenization_spaces": False,
        "chat_template": file.get("tokenizer.chat_template"),
    }
    return config | {name: tokens[token] for name, token in ids.items() if token is not None}


def _byte_level(file: GgufFile) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(file.require("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    pre = file.get("tokenizer.ggml.pre", "default")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_pre_tokenizers(pre))
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _QWEN:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizers(pre: str) -> list[Any]:
    if pre in _LLAMA3 or pre in _QWEN:
        words = _WORDS.format(digits=r"\p{N}{1,3}" if pre in _LLAMA3 else r"\p{N}")
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pre not in _DIGITS + _PLAIN:
        supported = ", ".join(_PLAIN + _DIGITS + _LLAMA3 + _QWEN)
        raise InvalidArgument(f"the GGUF pre-tokeniser {pre!r} is not supported; supported are {supported}")
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in _DIGITS else []
    return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _sentencepiece(file: GgufFile) -> Tokenizer:
    """SentencePiece BPE: merges follow from the scores; unknown characters fall back to byte tokens."""
    tokens, scores = file.require("tokenizer.ggml.tokens"), file.require("tokenizer.ggml.scores")
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(_SPACE)] if file.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to split a token into two others, best-scored token first."""
    merges = []
    for token, index in vocabulary.items():
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(-scores[index], vocabulary[left], vocabulary[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_special(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokens, kinds = file.require("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type", [])
    tagged = list(zip(tokens, kinds, strict=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in tagged if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in tagged if k == _USER_DEFINED])


def _prepend_bos(tokenizer: Tokenizer, file: GgufFile) -> None:
    index = file.require("tokenizer.ggml.bos_token_id")
    bos = file.require("tokenizer.ggml.tokens")[index]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
