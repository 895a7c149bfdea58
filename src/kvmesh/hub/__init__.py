"""Models: names, downloads, the cache, and one folder format for all that follows.

Whatever the source (a package of the catalogue, a GGUF file, the Hugging Face hub, a folder), the result is a
`ModelFolder`: `config.json`, `*.safetensors`, `tokenizer.json`, as transformers writes them. Knows no torch, no gRPC.
"""

from kvmesh.hub.catalogue import DEFAULT_MODEL
from kvmesh.hub.folder import ModelFolder
from kvmesh.hub.progress import Progress
from kvmesh.hub.resolve import ModelEntry, default_cache, list_models, pull, resolve

__all__ = [
    "DEFAULT_MODEL",
    "ModelEntry",
    "ModelFolder",
    "Progress",
    "default_cache",
    "list_models",
    "pull",
    "resolve",
]
