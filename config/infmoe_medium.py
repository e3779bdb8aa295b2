"""Infinity-MoE on GPT-2 medium (arXiv 2601.17680). FineWeb, 10B tokens, 8 x A100/H100.

The paper reports a zero-shot average of 41.3.
"""
from config.gpt2_medium import *

out_dir = "out/infmoe_medium"
flavour = "infmoe"
d_expert = 8192
infmoe_samples = 2
infmoe_rate = 0.25
infmoe_dz = 64
