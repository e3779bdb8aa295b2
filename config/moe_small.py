"""Top 2 of 4 (the paper's MoE), matched to GPT-2 small: two experts of 1536 do the work of its FFN of 3072."""
from config.gpt2_small import *

out_dir = "out/moe_small"
flavour = "topk"
n_experts, top_k, d_expert = 4, 2, 1536
