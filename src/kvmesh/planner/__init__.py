"""The planner: which host holds which layers of a model, and how many tokens a second flow through them.

Pure and synchronous. `catalogue` reads descriptions, `problem` turns cluster, model and workload into numbers,
`algorithms.place` solves, `evaluator` checks every answer independently, and `bound` proves how far it may be from the
best. Nothing here knows of processes, gRPC or torch.
"""
