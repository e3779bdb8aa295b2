"""GPT-2 124M on 10B tokens of FineWeb: the dense model that infinity-MoE is compared to.

8 x A100/H100, hours: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_small.py
One 24 GB card: the same batch by accumulation, --micro_batch=8.
Known from others: a validation loss of about 3.28 on FineWeb.
"""
# data: python prepare_data.py fineweb --max_tokens=10_000_000_000, or pretokenized
dataset = "data/fineweb"
out_dir = "out/gpt2_small"

arch = "gpt2"
n_layer = 12
n_head = 12
d_model = 768
block_size = 1024
vocab_size = 50304  # 50257 rounded up to a multiple of 128

batch_tokens = 524288
micro_batch = 32
max_steps = 19073  # 10B tokens
warmup_steps = 700

lr = 6e-4  # the infinity-MoE paper gives none: GPT-3's values for this size
min_lr = 6e-5
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_every = 250
eval_tokens = 10485760
save_every = 1000
log_every = 10

shard = "none"  # the paper shards the optimizer's state: --shard=zero1
