"""Measuring a mesh from outside: workloads, an open-loop load generator, and what to make of the figures.

Pure cores (`workload`, `prompts`, `statistics`), one asynchronous driver (`load`), and tables and plots (`report`).
"""
