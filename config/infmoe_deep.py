"""A deep infinity-MoE [ours; papers.md section 2, extensions 1-5]: two hidden layers, coarse to fine, dense-ish first.

W_1 768 x 3072, W 3072 x 3072, W_2 3072 x 768 a layer: about twice infmoe_small's FFN. z_2 depends on z_1, the second
hidden layer keeps fewer neurons, the masks act before the activation, experts in every second block only.
"""
from config.gpt2_small import *

out_dir = "out/infmoe_deep"
flavour, moe_every = "infmoe", 2
d_expert, infmoe_depth, infmoe_rate = 3072, 2, (0.5, 0.25)
infmoe_z, infmoe_mask = "hierarchical", "pre"
infmoe_samples, infmoe_dz = 2, 64
