"""Infinity-MoE in small: eight layers whose experts are indexed by a continuous code.

K = 2 samples, each keeping N = 25 % of an FFN that is twice as wide as a dense one: as many
active neurons. CPU, minutes.
"""
from config.tiny_dense import *

out_dir = "out/tiny_infmoe"
flavour = "infmoe"
n_layer = 8
n_head = 3
d_model = 96
d_ff = 192
init_std = 0.06
infmoe_dz = 32
