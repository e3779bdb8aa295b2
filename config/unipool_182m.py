"""UniPool at 182M active: one pool of 96 experts for 12 layers, 777.9M stored.

UniPool-full, as in the arXiv text of May 2026 (2605.06665). Validation loss there: 1.9029.
Fewer experts: --n_experts=64 keeps 66.7 % of the expert parameters, and beats the vanilla MoE in
the paper. More pools: --pool_groups=4 --n_experts=24 (the paper's ablation: G = 6, 4, 2).
"""
from config.llama_182m import *

out_dir = "out/unipool_182m"
flavour = "unipool"
n_experts = 96  # M = 8 L
balance_coef = 1e-2
