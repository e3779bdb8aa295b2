"""Switch (top 1 of 2), matched to GPT-2 small: 124M active, as many stored as moe_small.

The infinity-MoE paper names no number of experts for Switch. --n_experts=4 makes it 4 experts of
full width, at 294M stored.
"""
from config.gpt2_small import *

out_dir = "out/switch_small"
flavour = "switch"
n_experts = 2
top_k = 1
d_expert = 3072
