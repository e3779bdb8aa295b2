"""UniPool in small: eight layers, and one pool of 64 experts that all of them route into.  CPU, minutes."""
from config.tiny_dense import *

out_dir = "out/tiny_unipool"
flavour = "unipool"  # NormRouter, top 1, pool loss, one pool
n_layer, n_experts = 8, 64
d_model, d_ff, init_std = 96, 192, 0.06
n_head = 3
max_steps = 700
