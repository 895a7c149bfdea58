"""How long an engine's iteration takes: one interface, and a model a file, from published profiles or one's own."""

from kvmesh.planner.latency.api import Chunk, Latency
from kvmesh.planner.latency.distserve import DistServeLatency
from kvmesh.planner.latency.layers import LayersLatency
from kvmesh.planner.latency.roofline import RooflineLatency
from kvmesh.planner.latency.splitwise import SplitwiseLatency

__all__ = ["Chunk", "DistServeLatency", "Latency", "LayersLatency", "RooflineLatency", "SplitwiseLatency"]
