"""UniPool in small but deep: 16 layers, and one pool of 64 experts that all of them route into.

CPU, minutes.
"""
from config.tiny_dense import *

out_dir = "out/tiny_unipool"
flavour = "unipool"  # NormRouter, top 1, pool loss, one pool
n_layer = 16
n_experts = 64  # four a layer
n_head = 2
d_model = 64
d_ff = 128
init_std = 0.07
max_steps = 450
