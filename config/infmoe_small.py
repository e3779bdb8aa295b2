"""Infinity-MoE on GPT-2 small (arXiv 2601.17680). FineWeb, 10B tokens, 8 x A100/H100.

129M active and 186M stored parameters, as the paper counts: without the table of positions
(130.3M and 187.0M with it). The paper reports a zero-shot average of 39.8, above GPT-2 medium's.
"""
from config.gpt2_small import *

out_dir = "out/infmoe_small"
flavour = "infmoe"
d_expert = 6144  # twice the dense width
infmoe_samples = 2
infmoe_rate = 0.25  # 2 samples x 1536 neurons: as many as the dense FFN has
infmoe_dz = 64
