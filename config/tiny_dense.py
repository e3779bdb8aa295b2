"""A dense LLaMA-style model on bytes of Python source: the baseline of the tiny runs.

CPU, minutes.
"""
dataset = "data/stdlib"  # python prepare_data.py stdlib
out_dir = "out/tiny_dense"

arch = "llama"
n_layer = 4
n_head = 4
d_model = 128
d_ff = 256
init_std = 0.05  # 0.02 * sqrt(768 / 128): 0.02 belongs to a width of 768
block_size = 128
vocab_size = 257  # bytes, and end of text

batch_tokens = 2048
micro_batch = 16
max_steps = 900
warmup_steps = 50

lr = 4e-3
min_lr = 2e-4
weight_decay = 0.1

eval_every = 100
eval_tokens = 32768
save_every = 100
