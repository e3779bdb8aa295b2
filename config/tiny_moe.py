"""Eight experts a layer, two of them per token, on bytes of Python source.  CPU, minutes."""
from config.tiny_dense import *

out_dir = "out/tiny_moe"
flavour = "topk"  # softmax router, top 2 of 8, gates renormalised, Switch's balance loss
d_expert = 128  # two experts do the work of tiny_dense's FFN of 256
