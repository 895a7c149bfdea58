"""Simulation of requests through pipelines over hosts that hold spans of layers, and what it ranks best."""
