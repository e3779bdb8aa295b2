"""CS-MoE (arXiv 2609.22199) in small: one always-on expert a layer, and a pool for all layers.

Softmax over the chosen, a balance loss for each layer: existing parts. CPU, minutes.
"""
from config.tiny_dense import *

out_dir = "out/tiny_cs_moe"
flavour = "topk"
pool_groups = 1
n_experts = 32
n_shared_experts = 1  # the paper's N_indep, its best
d_expert = 64  # a quarter of the dense FFN, as in the paper
top_k = 3
