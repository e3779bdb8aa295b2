"""UniPool-lock at 182M active: the pool of unipool_182m.py is dealt out after 1/60 of the training.

What the paper's authors have called their main method since (arXiv 2605.06665, its repository): all
12 layers share 96 experts for 1,000 steps, others' experts fade until step 2,000, and then each
layer trains on with 8 of its own, at a vanilla MoE's cost. Test loss: 1.9029, as UniPool-full's.
Its control, a random allocation from the start: --lock_steps=0.
"""
from config.unipool_182m import *

out_dir = "out/unipool_lock_182m"
flavour = "lock"
