"""Infinity-MoE in small: eight layers whose experts are indexed by a continuous code.  CPU, minutes."""
from config.tiny_dense import *

out_dir = "out/tiny_infmoe"
flavour = "infmoe"  # K = 2 samples, each keeping N = 25 % of an FFN that is twice as wide: as many active units as the dense one
n_layer, d_model, d_ff, init_std = 8, 96, 192, 0.06
n_head, infmoe_dz = 3, 32
