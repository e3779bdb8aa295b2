"""UniPool at 830M active: one pool of 384 experts for 48 layers, 5.081B stored.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/unipool_830m.py
Validation loss in the paper: 1.6923.
"""
from config.unipool_182m import *

out_dir = "out/unipool_830m"
n_layer = 48
n_head = 16
d_model = 1024
n_experts = 384
balance_coef = 2e-2  # the paper's value above 182M
micro_batch = 16  # a pool is read once a micro-step and layer: fewer of them
shard = "ep"  # a rank owns an eighth of the experts; --plan=8 compares
