"""Top 2 of 4, matched to GPT-2 small: the MoE that the infinity-MoE paper compares with."""
from config.gpt2_small import *

out_dir = "out/moe_small"
flavour = "topk"
n_experts = 4
top_k = 2
d_expert = 1536  # two of them do the work of the dense FFN of 3072
