"""Both specialization losses in a training loop of Hugging Face's transformers.

    python examples/transformers_losses.py

losses.py needs torch and nothing else of this repository, so the functions travel. Hooks catch
what they ask for: what a router decided, and what each chosen expert's neurons did before the down
projection. The model is a tiny random OLMoE; Mixtral, Qwen3-MoE and others of transformers >= 5
have the same parts: a block's `gate` and its `experts`.
"""
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # your copy of losses.py
from losses import coupling_loss, specialization_loss

SPECIALIZATION, COUPLING = 2e-3, 1e-3  # the paper's coefficients (arXiv 2602.14159)


def chosen_activations(experts: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """silu(W_g x) * (W_u x) of the experts ids (T, K) that tokens x (T, D) chose: (T, K, F).

    It computes the up projections once more: the price of leaving transformers' code alone.
    """
    acts = x.new_zeros(*ids.shape, experts.down_proj.shape[-1])
    for e, w in enumerate(experts.gate_up_proj.unbind(0)):
        token, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ w.T).chunk(2, dim=-1)  # (n, F) each
        acts = acts.index_put((token, choice), experts.act_fn(gate) * up)
    return acts


def watch(model: nn.Module) -> tuple[list, list]:
    """Hooks on every MoE block -> lists that a forward pass fills, an entry a layer.

    Routers: (scores (T, E), ids (T, K)). Activations: (T, K, F). Clear them after each step.
    """
    routers, activations = [], []
    for block in model.modules():
        if hasattr(block, "gate") and hasattr(block, "experts"):
            block.gate.register_forward_hook(
                lambda gate, args, out: routers.append((out[0].float().softmax(-1), out[2])))
            block.experts.register_forward_hook(
                lambda m, args, out: activations.append(chosen_activations(m, *args[:2])))
    return routers, activations


def auxiliary_loss(routers: list, activations: list) -> torch.Tensor:
    """Means over layers and over adjacent layers; empties the lists."""
    apart = torch.stack([specialization_loss(a) for a in activations]).mean()
    pairs = zip(routers, routers[1:])
    paths = torch.stack([coupling_loss(*here, *after) for here, after in pairs]).mean()
    routers.clear()
    activations.clear()
    return SPECIALIZATION * apart + COUPLING * paths


def main(steps: int = 20) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM
    torch.manual_seed(1)
    config = OlmoeConfig(vocab_size=257, hidden_size=64, intermediate_size=64, num_experts=8,
                         num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                         num_experts_per_tok=2, pad_token_id=None, eos_token_id=256)
    model = OlmoeForCausalLM(config).train()
    text = torch.tensor(list(Path(__file__).read_bytes()))  # this file, as bytes
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    routers, activations = watch(model)
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - 64, (8,))
        batch = torch.stack([text[s:s + 64] for s in starts])  # (B, S)
        loss = model(input_ids=batch, labels=batch).loss
        aux = auxiliary_loss(routers, activations)
        (loss + aux).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:2}  loss {loss.item():.3f}  auxiliary {aux.item():+.6f}")


if __name__ == "__main__":
    main()
