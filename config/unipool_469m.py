"""UniPool at 469M active: one pool of 192 experts for 24 layers, 2.588B stored.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/unipool_469m.py
Validation loss in the paper: 1.7636.
"""
from config.unipool_182m import *

out_dir = "out/unipool_469m"
n_layer = 24
n_head = 16
d_model = 1024
n_experts = 192
balance_coef = 2e-2  # the paper's value above 182M
micro_batch = 8
shard = "zero1"
