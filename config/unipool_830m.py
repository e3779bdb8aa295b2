"""UniPool at 830m active: one pool of 384 experts for 48 layers, 5.081B stored. Validation loss in the paper: 1.6923.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/unipool_830m.py
"""
from config.unipool_182m import *

out_dir = "out/unipool_830m"
n_layer, n_head, d_model, n_experts = 48, 16, 1024, 384
balance_coef = 2e-2  # the paper's value above 182M
micro_batch = 8
shard, recompute = "fsdp", True
