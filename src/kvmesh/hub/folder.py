"""A model on disk, as transformers lays it out, and what the mesh needs to know of it without loading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.types import CHUNK_TOKENS

_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class ModelFolder:
    """`config.json`, `*.safetensors`, `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`."""

    name: str
    path: Path

    def check(self) -> ModelFolder:
        """Returns itself.

        Raises:
            NotFound: it is not a model folder.
        """
        if not (self.path / "config.json").is_file():
            raise NotFound(f"{self.path} is not a model folder: it has no config.json")
        if not any(self.path.glob("*.safetensors")):
            raise NotFound(f"{self.path} is not a model folder: it has no .safetensors file")
        return self

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json`."""
        return self._json("config.json")

    @property
    def tokenizer_path(self) -> Path:
        """`tokenizer.json`, which may be missing."""
        return self.path / "tokenizer.json"

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """`tokenizer_config.json`, empty if missing."""
        return self._json("tokenizer_config.json", optional=True)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template of a chat, None if the model has none."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            return named.get("default")
        return template

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """Text of `bos_token`, `eos_token`, `pad_token` and `unk_token`, those that there are; templates use them."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        found = {name: self.tokenizer_config.get(name) for name in names}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items() if token}

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: of `generation_config.json`, else of `config.json`."""
        generation = self._json("generation_config.json", optional=True)
        ids = generation.get("eos_token_id", self.config.get("eos_token_id"))
        return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return int(self._required("max_position_embeddings"))

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding; the tokenizer may know fewer tokens."""
        return int(self._required("vocab_size"))

    @cached_property
    def revision(self) -> str:
        """Identifies the weights, cheaply: hash of `config.json`, names, sizes, headers and a sample of the bytes."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self.path.glob("*.safetensors")):
            _hash_weights(file, digest)
        return digest.hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hash of `tokenizer.json`, or "none"."""
        path = self.tokenizer_path
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"

    def layout(self, dtype: str, precision: str = "float32") -> dict[str, str]:
        """All that KV must agree on to be shared, as fields of the fingerprint; `dtype` as `KvLayout.dtype`.

        `precision` is that of the weights that computed it.

        Raises:
            InvalidArgument: a dtype that KV is not stored in.
        """
        if dtype not in ("float32", "bfloat16", "float16"):
            raise InvalidArgument(f"the KV dtype {dtype!r} is not one of float32, bfloat16, float16")
        config = self.config
        heads = int(self._required("num_attention_heads"))
        rope = config.get("rope_parameters") or [config.get("rope_theta"), config.get("rope_scaling")]
        fields = {
            "model": config.get("model_type"),
            "revision": self.revision,
            "tokenizer": self.tokenizer_hash,
            "rope": json.dumps(rope, sort_keys=True),
            "layers": self._required("num_hidden_layers"),
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or self._required("hidden_size") // heads,
            "dtype": dtype,
            "precision": precision,
            "layout": "layers,kv,tokens,kv_heads,head_dim",
            "chunk_tokens": CHUNK_TOKENS,
            "tensor_parallel": 1,
            "adapter": "",
            "codec": "exact",
        }
        if "kv_lora_rank" in config:
            entry = int(config["kv_lora_rank"]) + int(self._required("qk_rope_head_dim"))
            fields |= {"kv_heads": 1, "head_dim": entry, "layout": "layers,latent,tokens,1,rank+rope"}
        return {name: str(value) for name, value in fields.items()}

    def _required(self, name: str) -> Any:
        if name not in self.config:
            raise InvalidArgument(f"{self.path / 'config.json'} lacks the field {name!r}")
        return self.config[name]

    def _json(self, name: str, optional: bool = False) -> dict[str, Any]:
        path = self.path / name
        if optional and not path.is_file():
            return {}
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return value
        except FileNotFoundError:
            raise NotFound(f"{self.path} is not a model folder: it has no {name}") from None
        except ValueError as error:
            raise InvalidArgument(f"{path} is not valid JSON: {error}") from None


def _hash_weights(file: Path, digest: hashlib._Hash) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}:".encode())
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(min(header, size)))
        for index in range(_SAMPLES):
            stream.seek(size * index // _SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
