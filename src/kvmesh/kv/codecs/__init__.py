"""Representations of KV, one file each; `codec.py` holds the registry and the plain one.

int8, fp8   baselines, no model knowledge: numpy alone
lossless    exponents coded, bit by bit the same
cachegen    quantised by layer (quantiser), entropy coded (rans) with the distributions of a profile
transform   turned back (rotary), weighted and projected (basis, packing), coded coarse to fine (renditions, embedded)
profile     what is measured once per model (calibration); its hash is part of the namespace
choice      from a setting to a codec

`rans` is interleaved asymmetric numeral systems over bytes; loops in `*_kernels` are compiled by numba when first used.
"""
