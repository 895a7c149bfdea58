"""Attention over paged KV: the pool, the plan/run interface and its back ends. Knows no weights and no requests."""
