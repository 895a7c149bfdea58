"""Lossy representations of KV, one file each; `codec.py` holds the registry and the exact one.

int8, fp8   baselines, no model knowledge: numpy alone
cachegen    quantised by layer, entropy coded (rans) with the distributions of a profile
rans        interleaved asymmetric numeral systems over bytes; compiled by numba when first used
profile     what is measured once per model; its hash is part of the namespace
"""
