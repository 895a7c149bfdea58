"""Chooses how iterations are computed, once at start-up, by what the model and its attention allow."""

from __future__ import annotations

import logging

import torch

from kvmesh.engine.attention.flashinfer import FlashInferAttention
from kvmesh.engine.attention.interface import Attention
from kvmesh.engine.cuda.graphs import CudaRecorder, GraphedForward
from kvmesh.engine.forward import EagerForward, Forward
from kvmesh.engine.models.llama import Decoder
from kvmesh.engine.native_forward import native_forward

log = logging.getLogger(__name__)


def forward_of(model: Decoder, attention: Attention) -> Forward:
    """Graphs on CUDA where the attention allows: experts are chosen on the host, which no graph can do. On a CPU all
    layers in one native call where there is one for such a model."""
    on_cuda = torch.device(model.device).type == "cuda"
    if on_cuda and isinstance(attention, FlashInferAttention) and model.config.experts is None:
        graphed = GraphedForward(model, attention, CudaRecorder())
        if graphed.agrees():
            log.info("decode steps: replayed from CUDA graphs")
            return graphed
        log.warning("decode steps: not replayed from CUDA graphs, which failed or disagreed")
        return EagerForward(model, attention)
    if native := native_forward(model, attention):
        log.info("forward pass: all layers in one native call")
        return native
    return EagerForward(model, attention)
