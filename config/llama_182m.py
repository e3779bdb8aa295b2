"""The dense LLaMA of UniPool's smallest scale (arXiv 2605.06665): 182M, the Pile, 30B tokens. Validation loss there: 2.042.

8 x 80 GB: torchrun --standalone --nproc_per_node=8 train.py config/llama_182m.py
"""
dataset = "data/pile"  # python prepare_data.py pile
out_dir = "out/llama_182m"
arch = "llama"
n_layer, n_head, n_kv_head, d_model = 12, 12, 4, 768  # F = 4 D
block_size, vocab_size, rope_base = 1024, 51200, 1e6  # GPT-2's BPE, padded
tie_embeddings, init_std = False, 0.01
batch_tokens, micro_batch = 524288, 16
max_steps, warmup_steps = 60000, 600
lr, min_lr, weight_decay = 5e-4, 5e-5, 0.01
beta1, beta2, grad_clip = 0.9, 0.999, 1.0
eval_every, eval_tokens, save_every = 500, 10485760, 1000
log_every = 10
