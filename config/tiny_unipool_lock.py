"""UniPool-lock in small: 16 layers share 64 experts for 1/60 of the training, then own 4 each.

CPU, minutes.
"""
from config.tiny_unipool import *

out_dir = "out/tiny_unipool_lock"
flavour = "lock"
