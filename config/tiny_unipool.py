"""UniPool in small: eight layers, and one pool of 64 experts that all of them route into.  CPU, minutes."""
from config.tiny_dense import *

out_dir = "out/tiny_unipool"
flavour = "unipool"  # NormRouter, top 1, pool loss, one pool
balance_scores = "normalised"  # raw scores, as published, let the routers of so small a model fall silent: results/log.md
n_layer, n_experts = 8, 64
d_model, d_ff = 96, 192
n_head = 3
max_steps = 700
