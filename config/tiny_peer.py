"""PEER (arXiv 2407.04153) in small: 2^14 experts of one GELU neuron in every layer, 128 at work.

A CPU takes 14 times as long for such a layer as for a dense FFN of as many active parameters: every
token gathers rows of its own.
"""
from config.tiny_dense import *

out_dir = "out/tiny_peer"
flavour = "peer"
activation = "gelu"
