"""UniPool at 650m active: one pool of 288 experts for 36 layers, 3.834B stored. Validation loss in the paper: 1.7260.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/unipool_650m.py
"""
from config.unipool_182m import *

out_dir = "out/unipool_650m"
n_layer, n_head, d_model, n_experts = 36, 16, 1024, 288
balance_coef = 2e-2  # the paper's value above 182M
micro_batch = 8
shard, recompute = "fsdp", True
