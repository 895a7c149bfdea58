"""Measuring from outside: workloads, an open-loop load generator, and what to make of the figures.

Pure cores (`workload`, `prompts`, `statistics`), one asynchronous driver (`load`) of a mesh or a server of OpenAI's
kind (`targets`), and tables and plots (`report`).
"""
