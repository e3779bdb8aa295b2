"""PEER (arXiv 2407.04153) in small: 2^14 experts of one GELU neuron in every layer, 128 at work.

CPU: 15 times as slow as tiny_dense.py, as every token gathers rows of its own.
"""
from config.tiny_dense import *

out_dir = "out/tiny_peer"
flavour = "peer"
activation = "gelu"
