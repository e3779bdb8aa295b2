"""Take experts of a trained model out, or move them between layers, and measure the loss.

    python -m lab.surgery --out_dir=out/x                            # without: the newest run
    python -m lab.surgery --hf=NAME_OR_DIR --dataset=TEXT_OR_FOLDER  # mixtral, olmoe, qwen3_moe

Prune (REAP, arXiv 2510.13999): in every bank the experts go whose saliency, the mean over the
tokens that chose them of gate * |f_e(x)|, is lowest; beside it the least used, and random ones.
Routers then choose among the others, as if the rows of the pruned had been deleted.

Move (CS-MoE's test, arXiv 2609.22199): experts of the deep half of the layers are replaced by those
of the shallow half that work for the most similar tokens (cosine of their uses; the paper compares
activations), or by random ones. Only private experts have a layer to be moved from.

Writes the table next to the checkpoint, or into --save_dir.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import moe
import probe
from configurator import parse
from model import GPT
from support import hf
from support.routers import hooked
from support.usage import one_line


@dataclass
class SurgeryConfig(probe.ProbeConfig):
    prune: tuple = (0.25, 0.5)  # shares of every bank's experts to take out
    move: tuple = (0.05, 0.2)  # shares of the deep half's experts to replace

    def __post_init__(self):
        super().__post_init__()
        for name in ("prune", "move"):
            if not all(isinstance(s, (int, float)) and 0 < s < 1 for s in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: shares between 0 and 1")


def load(config):
    """-> Subject with a GPT of ours, whoever trained it."""
    if not config.hf:
        return probe.load_ours(config)
    subject = probe.load_hf(config)  # its text is that of its own tokenizer
    subject.model, subject.options = GPT.from_hf(config.hf).eval(), {}
    return subject


@torch.no_grad()
def study(subject, config):
    """-> used (L, E) tokens of each layer's experts, saliency sums (L, E), uses: L (T, E) bool."""
    layers, seen = subject.model.expert_layers(), []
    keep = lambda _, args, out: seen.append((args[0], out[1]))
    n = subject.model.config.n_experts
    used, saliency, uses = torch.zeros(len(layers), n), torch.zeros(len(layers), n), []
    for batch in probe.batches(subject, config, "what experts do"):
        seen.clear()
        with hooked([(layer, keep) for layer, _ in layers]):
            subject.model(batch[:, :-1])
        for i, ((layer, bank), (x, routing)) in enumerate(zip(layers, seen)):
            x = x if layer.depth is None else x + layer.depth.weight
            works = worked(layer, routing)
            for e in range(n):
                token, choice = ((routing.ids == e) & works).nonzero(as_tuple=True)
                act = moe.activate(x[token] @ bank.w_in[e].T, bank.activation)
                size = (act @ bank.w_out[e].T).norm(dim=-1)  # (tokens of e,)
                saliency[i, e] += (routing.weights[token, choice] * size).sum().cpu()
                used[i, e] += len(token)
        uses.append([
            torch.zeros(len(r.ids), n, dtype=torch.bool).scatter(
                1, r.ids.cpu(), worked(layer, r).cpu())
            for (layer, _), (_, r) in zip(layers, seen)])
    return used, saliency, [torch.cat(parts) for parts in zip(*uses)]


def worked(layer, routing):
    """(T, K) bool: ReMoE lists all experts, and those with gate 0 do nothing."""
    idle = (routing.weights == 0) & layer.router.zero_is_idle
    return ~idle


def without(router, pruned):
    """-> undo(): until then the router neither scores nor chooses the experts pruned (E,) bool."""
    scores, bias = router.scores, router.bias
    away = pruned.to(router.weight.device)
    absent = 0.0 if isinstance(router, moe.NormRouter) else -torch.inf  # in its norm, in a softmax
    router.scores = lambda logits: scores(logits.masked_fill(away, absent))
    router.bias = (0.0 if bias is None else bias) - 1e9 * away.float()

    def undo():
        del router.scores
        router.bias = bias
    return undo


def prune(subject, config, value, share):
    """value(layers of a bank) -> (E,). -> loss without the lowest share of each bank's experts."""
    undo, c = [], subject.model.config
    for bank in subject.banks:
        n = min(round(share * c.n_experts), c.n_experts - c.top_k)
        pruned = torch.zeros(c.n_experts, dtype=torch.bool)
        pruned[value(bank).argsort()[:n]] = True
        undo += [without(subject.model.expert_layers()[i][0].router, pruned) for i in bank]
    try:
        return probe.held_out(subject, config)[:, 0].mean()
    finally:
        for step in undo:
            step()


def move(subject, config, uses, share, generator=None):
    """-> loss with experts of the deep half replaced; by the most alike, or at random."""
    banks, half = [bank for _, bank in subject.model.expert_layers()], len(uses) // 2
    units = torch.cat([F.normalize(u.float(), dim=0) for u in uses], 1).T  # (L * E, T)
    n = uses[0].shape[1]
    alike = units[half * n:] @ units[:half * n].T  # (deep experts, shallow experts)
    if generator is not None:
        alike = torch.rand(alike.shape, generator=generator)
    best, source = alike.max(1)
    saved = [{k: p.detach().clone() for k, p in bank.named_parameters()} for bank in banks]
    with torch.no_grad():
        for deep in best.argsort(descending=True)[:max(1, round(share * len(best)))].tolist():
            (to, e), (origin, f) = divmod(half * n + deep, n), divmod(source[deep].item(), n)
            for name, p in banks[to].named_parameters():
                p[e] = saved[origin][name][f]
        loss = probe.held_out(subject, config)[:, 0].mean()
        for bank, before in zip(banks, saved):
            for name, p in bank.named_parameters():
                p.copy_(before[name])
    return loss


def operate(subject, config):
    """-> rows (operation, share, by what, loss) of everything asked for; the first is the whole."""
    yield "nothing", 0.0, "-", probe.held_out(subject, config)[:, 0].mean()
    used, saliency, uses = study(subject, config)
    g = torch.Generator().manual_seed(0)
    ways = {"saliency": lambda bank: saliency[bank].sum(0) / used[bank].sum(0).clamp_min(1),
            "use": lambda bank: used[bank].sum(0),
            "random": lambda bank: torch.rand(used.shape[1], generator=g)}
    for share in config.prune:
        for name, value in ways.items():
            yield "prune", share, name, prune(subject, config, value, share)
    if len(subject.banks) == len(uses) > 1:
        for share in config.move:
            yield "move", share, "similar use", move(subject, config, uses, share)
            yield "move", share, "random", move(subject, config, uses, share, g)


def main():
    config = parse(SurgeryConfig, doc=__doc__).make(SurgeryConfig)
    with one_line():
        if config.hf:
            hf.need_transformers()
        else:
            config.out_dir = config.out_dir or probe.find_model(config)
        subject = load(config)
        c = subject.model.config
        if c.expert != "ffn" or not moe.ROUTERS[c.router].supports:
            raise ValueError(f"{subject.name}: surgery is for FFN experts and a learned router")
        rows, folder = list(operate(subject, config)), probe.folder_of(config)
    whole, unit = rows[0][3], f"nats per {subject.unit}"
    lines = [f"{subject.name}, {subject.windows[:, 1:].size:,} held-out tokens", "",
             f"| operation | share | chosen by | loss ({unit}) | change |", "|---|---|---|---|---|"]
    lines += [f"| {a} | {share:.0%} | {way} | {loss:.4f} | {loss - whole:+.4f} |"
              for a, share, way, loss in rows]
    print("\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "surgery").with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
