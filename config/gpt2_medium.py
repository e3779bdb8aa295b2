"""GPT-2 355M on 10B tokens of FineWeb.

8 x A100/H100, a day at most; --recompute if memory is short.
"""
from config.gpt2_small import *

out_dir = "out/gpt2_medium"
n_layer = 24
n_head = 16
d_model = 1024
micro_batch = 16
lr = 3e-4
min_lr = 3e-5
