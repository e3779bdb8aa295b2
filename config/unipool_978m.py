"""UniPool at 978M active: one pool of 192 experts for 24 layers, 5.742B stored.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/unipool_978m.py
Validation loss in the paper: 1.6999.
"""
from config.unipool_182m import *

out_dir = "out/unipool_978m"
n_layer = 24
n_head = 16
d_model = 1536
n_experts = 192
balance_coef = 2e-2  # the paper's value above 182M
micro_batch = 16  # a pool is read once a micro-step and layer: fewer of them
shard = "ep"  # a rank owns 24 experts; --plan=8 compares
