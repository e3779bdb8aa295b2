"""Infinity-MoE on GPT-2 small: 129M active, 186M stored (arXiv 2601.17680). FineWeb, 10B tokens, 8 x A100/H100.

K = 2 samples, each keeping N = 25 % of F = 6144 neurons: 2 x 1536 active, the dense width.
The paper reports a zero-shot average of 39.8, above GPT-2 medium's.
"""
from config.gpt2_small import *

out_dir = "out/infmoe_small"
flavour = "infmoe"
d_expert = 6144
infmoe_samples, infmoe_rate, infmoe_dz = 2, 0.25, 64
