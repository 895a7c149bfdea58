"""From a model folder to a decoder on a device. Knows neither downloads nor GGUF: `kvmesh.hub` has made a folder."""

from kvmesh.engine.loading.loader import load

__all__ = ["load"]
