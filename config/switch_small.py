"""Switch (top 1), matched to GPT-2 small: 2 experts of 3072, so 124M active and as many stored as moe_small and infmoe_small.

The paper names no number of experts for Switch; --n_experts=4 makes it 4 full-width ones at 294M stored.
"""
from config.gpt2_small import *

out_dir = "out/switch_small"
flavour = "switch"
n_experts, top_k, d_expert = 2, 1, 3072
