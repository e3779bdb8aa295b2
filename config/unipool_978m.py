"""UniPool at 978m active: one pool of 192 experts for 24 layers, 5.742B stored. Validation loss in the paper: 1.6999.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/unipool_978m.py
"""
from config.unipool_182m import *

out_dir = "out/unipool_978m"
n_layer, n_head, d_model, n_experts = 24, 16, 1536, 192
balance_coef = 2e-2  # the paper's value above 182M
micro_batch = 8
shard, recompute = "fsdp", True
