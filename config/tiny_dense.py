"""A dense LLaMA-style model on bytes of Python source: the baseline of the tiny runs.  CPU, minutes."""
dataset = "data/stdlib"  # python prepare_data.py stdlib
out_dir = "out/tiny_dense"
arch = "llama"
n_layer, n_head, d_model, d_ff = 4, 4, 128, 256
init_std = 0.05  # 0.02 * sqrt(768 / 128): 0.02 belongs to a width of 768
block_size, vocab_size = 128, 257
batch_tokens, micro_batch = 2048, 16
max_steps, warmup_steps = 900, 50
lr, min_lr, weight_decay = 4e-3, 2e-4, 0.1
eval_every, eval_tokens, save_every = 100, 32768, 100
