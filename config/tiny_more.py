"""MoRE (arXiv 2609.18176) in small: every two adjacent layers share a pool, and know their depth.

On DeepSeek's mixture, as in the paper. CPU, minutes.
"""
from config.tiny_dense import *

out_dir = "out/tiny_more"
flavour = "deepseek"
pool_groups = n_layer // 2  # reuse factor R = 2
n_experts = 16  # R times 8
d_expert = 85  # two chosen and one always-on expert do the work of tiny_dense's FFN
depth_embedding = True
