"""The dense LLaMA of UniPool's smallest scale (arXiv 2605.06665): 182M, the Pile, 30B tokens.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/llama_182m.py
Validation loss in the paper: 2.042.
"""
dataset = "data/pile"  # python prepare_data.py pile
out_dir = "out/llama_182m"

arch = "llama"
n_layer = 12
n_head = 12
n_kv_head = 4
d_model = 768  # and F = 4 D
block_size = 1024
vocab_size = 51200  # GPT-2's BPE, padded
rope_base = 1e6
tie_embeddings = False
init_std = 0.01

batch_tokens = 524288
micro_batch = 16
max_steps = 60000
warmup_steps = 600

lr = 5e-4
min_lr = 5e-5
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0

eval_every = 500
eval_tokens = 10485760
save_every = 1000
log_every = 10
