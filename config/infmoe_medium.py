"""Infinity-MoE on GPT-2 medium (arXiv 2601.17680: zero-shot average 41.3). FineWeb, 10B tokens, 8 x A100/H100."""
from config.gpt2_medium import *

out_dir = "out/infmoe_medium"
flavour = "infmoe"
d_expert = 8192
infmoe_samples, infmoe_rate, infmoe_dz = 2, 0.25, 64
