"""What tests of hf, probe and evaluate share: tiny random models, and real text in shards."""
import dataclasses
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model import GPT, ModelConfig
from support.shards import write_shard
from support.tokenizer import get_tokenizer

VOCAB, CONTEXT = 257, 32  # bytes and end of text
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)
DEEPSEEK = dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                n_shared_experts=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4,
                n_group=1, topk_group=1)
# model type -> what it needs beyond SHAPE; every one of them has six experts, two per token
ROUTED = {
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2),
    "olmoe": dict(num_experts=6, num_experts_per_tok=2),
    "qwen2_moe": dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                      shared_expert_intermediate_size=24),
    "qwen3_moe": dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16),
    "deepseek_v2": DEEPSEEK | dict(topk_method="greedy"),
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": dict(num_local_experts=6, num_experts_per_tok=2, head_dim=8, sliding_window=16),
    "granitemoe": dict(num_local_experts=6, num_experts_per_tok=2),
}


def hf_model(model_type, **changes):
    """A tiny model of transformers' with random weights so large that every part of it counts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = SHAPE if model_type != "gpt2" else dict(vocab_size=VOCAB, n_embd=32, n_layer=2,
                                                    n_head=4, n_positions=CONTEXT)
    config = transformers.AutoConfig.for_model(model_type,
                                               **shape | ROUTED.get(model_type, {}) | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    torch.manual_seed(7)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1.0 if "norm" in name or "ln_" in name else 0.0,
                        std=0.2 if "embed" not in name else 1.0)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def tokens(batch=3, length=20, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def text_shards(folder, n_train=200_000, n_val=20_000):
    """The standard library's source as bytes: a real text, on every machine."""
    tokenizer = get_tokenizer("bytes")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files[:60])
    assert len(text) > n_train + n_val, "this Python has no source of its standard library"
    folder.mkdir(parents=True)
    data = np.frombuffer(text, np.uint8).astype(np.uint16)
    write_shard(folder / "train_000000.bin", data[:n_train])
    write_shard(folder / "val_000000.bin", data[n_train:n_train + n_val])
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes",
                                                  "vocab_size": tokenizer.vocab_size}))
    return str(folder)


SIZE = dict(n_layer=2, n_head=4, d_model=32, d_ff=40, block_size=CONTEXT, vocab_size=VOCAB)


def random_model(**settings):
    """One of our models with random weights large enough that every part of it counts."""
    model = GPT(ModelConfig(**SIZE | settings)).eval()
    torch.manual_seed(7)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1.0 if "norm" in name or "sigma" in name else 0.0, std=0.2)
    return model


def save_checkpoint(model, folder, dataset):
    """What train.py leaves, as far as the scripts that read it are concerned."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config),
             "tokenizer": "bytes", "step": 0}
    torch.save(saved | {"train_config": {"dataset": dataset}}, folder / "ckpt.pt")
    return str(folder)
