"""kvmesh: an asyncio gRPC mesh that serves language models on machines that are not alike."""

__version__ = "0.1.0"
