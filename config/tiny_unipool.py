"""UniPool in small: eight layers, and one pool of 64 experts that all of them route into.

CPU, minutes.
"""
from config.tiny_dense import *

out_dir = "out/tiny_unipool"
flavour = "unipool"  # NormRouter, top 1, pool loss, one pool
n_layer = 8
n_experts = 64
n_head = 3
d_model = 96
d_ff = 192
init_std = 0.06
max_steps = 700
