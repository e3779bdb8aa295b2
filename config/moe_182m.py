"""UniPool's vanilla baseline at 182M: 8 private experts a layer, top 1, raw softmax gate.

Validation loss in the paper: 1.9317.
"""
from config.llama_182m import *

out_dir = "out/moe_182m"
flavour = "switch"
n_experts = 8
top_k = 1
