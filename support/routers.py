"""Watching and rerouting the routers of a model, ours or one of transformers', by forward hooks."""
import contextlib
import itertools
import re
from typing import NamedTuple

import torch
from torch import nn

from support.noise import normal_noise, uniform_noise

FAMILIES = ("Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3, gpt-oss "
            "and Granite-MoE")  # of transformers: their routers are *TopKRouter modules


class Layer(NamedTuple):
    """One layer with experts."""
    index: int  # of its block
    router: nn.Module  # returns Routing, a tuple of Codes, or transformers' (logits, gates, ids)
    block: nn.Module  # router and experts together
    experts: nn.Module  # layers that share a pool have the same object here
    n_experts: int  # to choose from; infmoe: hidden neurons
    top_k: int


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers with experts of our GPT, or of a model of transformers'; ValueError for none."""
    if hasattr(model, "expert_layers"):
        c = model.config
        n, top_k = c.n_experts or c.d_expert, c.top_k or c.infmoe_samples
        layers = [Layer(i, ffn.router, ffn, bank, n, top_k)
                  for i, (ffn, bank) in zip(c.moe_layers(), model.expert_layers())]
    else:
        top_k, layers = getattr(model.config.get_text_config(), "num_experts_per_tok", None), []
        for name, router in model.named_modules():
            if type(router).__name__.lower().endswith("topkrouter"):
                block = model.get_submodule(name.rpartition(".")[0])
                layers.append(Layer(int(re.search(r"\.(\d+)\.", name)[1]), router, block,
                                    getattr(block, "experts", block), len(router.weight), top_k))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no router to ask: it is dense, or has no "
                         f"*TopKRouter module, as {FAMILIES} have")
    return layers


def bank_numbers(layers) -> list[int]:
    """The number of each layer's bank: layers with the same number share a pool."""
    banks = list(dict.fromkeys(id(layer.experts) for layer in layers))
    return [banks.index(id(layer.experts)) for layer in layers]


@contextlib.contextmanager
def hooked(hooks):
    """hooks: pairs of a module and a forward hook; gone when the `with` ends."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of our GPT, or of a model of transformers': the list that the routers are in."""
    if hasattr(model, "blocks"):
        return model.blocks
    name = next(n for n, m in model.named_modules()
                if type(m).__name__.lower().endswith("topkrouter"))
    return model.get_submodule(re.match(r"(.*?)\.\d+\.", name)[1])


@contextlib.contextmanager
def replayed(blocks, start, measure):
    """While it is open, blocks before `start` return what they did in a measure() made first.

    Probes that change only later blocks are right, and spare the rest, as long as each measure()
    takes the same batches in the same order.
    """
    last, before = [], list(blocks[:start])  # last: of the last of them, one output per batch
    outputs = [None] * start  # of the others only the form counts: nobody computes with it

    def keep(i):
        def hook(module, args, output):
            outputs[i] = output
            if i == start - 1:
                last.append(output)
        return hook

    if before:
        with hooked([(block, keep(i)) for i, block in enumerate(before)]):
            measure()
        outputs = [itertools.repeat(output) for output in outputs[:-1]] + [itertools.cycle(last)]
    own = [vars(block).get("forward") for block in before]  # accelerate puts its own there
    for block, again in zip(before, outputs):
        block.forward = lambda *args, again=again, **kwargs: next(again)
    try:
        yield
    finally:
        for block, forward in zip(before, own):
            del block.forward
            if forward is not None:
                block.forward = forward


def is_codes(output):
    """Did a router of infinity-MoE return this? Codes of hidden layers, None for a dense one."""
    return not hasattr(output, "ids") and any(hasattr(code, "logvar") for code in output)


def gates_and_ids(output):
    """Gates and choices (T, K) in a discrete router's output, ours or transformers'."""
    if hasattr(output, "ids"):
        return output.weights, output.ids
    if isinstance(output, tuple) and len(output) == 3:
        _, gates, ids = output
        if gates.shape == ids.shape and not ids.is_floating_point():
            return gates, ids
    raise ValueError(f"this router does not return (logits, gates, ids), as those of {FAMILIES} do")


def another_choice(layer, output, noise_seeds, seed=0, among=None, gates="learned"):
    """A router's output with K distinct experts drawn uniformly, or codes from N(0, I).

    The rest is as it was. The noise is a pure function of noise_seeds (T,), seed and layer.
    among: experts to draw from; None: all. gates: learned, or uniform.
    """
    stream = 64 * (1000 * seed + layer.index)  # 64: the hidden layers of a deep infmoe
    if is_codes(output):
        return another_code(layer, output, noise_seeds, stream)
    weights, ids = gates_and_ids(output)
    among = torch.arange(layer.n_experts) if among is None else among
    noise = uniform_noise(noise_seeds.to(ids.device), stream, len(among))  # (T, choices)
    ids = among.to(ids)[noise.topk(ids.shape[1]).indices]  # (T, K)
    if gates == "uniform":
        weights = weights.mean(-1, keepdim=True).expand_as(weights)
    if hasattr(output, "ids"):
        return output._replace(weights=weights, ids=ids)
    return output[0], weights, ids


def another_code(layer, codes, noise_seeds, stream):
    """Codes of H hidden layers with z from N(0, I): the same one for all where they share it."""
    new = []
    for i, code in enumerate(codes):
        if code is not None:
            n, own = code.z[0].numel(), 0 if layer.router.z == "shared" else i
            noise = normal_noise(noise_seeds, stream + own, n)
            code = code._replace(z=noise.view_as(code.z).to(code.z))
        new.append(code)
    return tuple(new)
