"""GPT-2 124M on 10B tokens of FineWeb: the dense model that infinity-MoE (arXiv 2601.17680) is compared to.

8 x A100/H100, hours: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_small.py
One 24 GB card: the same batch by accumulation, --micro_batch=8. Known from others: validation loss about 3.28 on FineWeb.
"""
dataset = "data/fineweb"  # python prepare_data.py fineweb --max_tokens=10_000_000_000, or pretokenized
out_dir = "out/gpt2_small"
arch = "gpt2"
n_layer, n_head, d_model = 12, 12, 768
block_size, vocab_size = 1024, 50304  # 50257 rounded up to a multiple of 128
batch_tokens, micro_batch = 524288, 32
max_steps, warmup_steps = 19073, 700  # 10B tokens
lr, min_lr, weight_decay = 6e-4, 6e-5, 0.1  # the paper gives none: GPT-3's for this size
beta1, beta2, grad_clip = 0.9, 0.95, 1.0
eval_every, eval_tokens, save_every = 250, 10485760, 1000
log_every = 10
shard = "none"  # the paper shards the optimizer's state: --shard=zero1
