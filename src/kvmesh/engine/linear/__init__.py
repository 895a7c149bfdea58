"""Ways of multiplying by a weight matrix: one file each, chosen at loading by the precision. Knows no model."""

from kvmesh.engine.linear.dense import Dense
from kvmesh.engine.linear.interface import Linear
from kvmesh.engine.linear.precision import PRECISIONS, Packing, packing_of, resolve_precision

__all__ = ["PRECISIONS", "Dense", "Linear", "Packing", "packing_of", "resolve_precision"]
