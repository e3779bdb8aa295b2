"""A deep infinity-MoE [ours]: two hidden layers a block, coarse to fine, in every second block.

After the extensions that section 7.3 of a published reading of the paper proposes. A layer holds
W_1 768 x 3072, W 3072 x 3072 and W_2 3072 x 768: about twice infmoe_small's FFN.
"""
from config.gpt2_small import *

out_dir = "out/infmoe_deep"
flavour = "infmoe"
moe_every = 2  # the other blocks have a dense FFN
d_expert = 3072
infmoe_depth = 2
infmoe_rate = (0.5, 0.25)  # the second hidden layer keeps fewer neurons
infmoe_z = "hierarchical"  # z_2 depends on z_1
infmoe_mask = "pre"  # masks act before the activation
infmoe_samples = 2
infmoe_dz = 64
