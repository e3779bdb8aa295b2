"""A page to look at routing: one HTML file that needs no network and no build step.

    write_page("out/x/page.html", [collect(model, tokenizer, tokens, "a pool")])
    write_page("out/x/page.html", [collect(...), collect(...)])     # two models side by side

collect watches one forward pass, of our GPT or of a model of transformers', and returns plain
numbers; page.html draws them. Whatever else fills in the same dictionary can be drawn, too:

    name     str          shown above the model
    tokens   [n] str      the text, a token each
    next     str          the token after the last one, which it has to predict
    layers   [L] int      block numbers of the layers with experts
    banks    [L] int      number of each layer's bank: layers with the same number share a pool
    loss     [n] float    nats; of predicting the token *after* this one
    random   [L][n] float the same with this one layer's routing random, for all tokens

    experts  int          E: how many a layer chooses from; None for infinity-MoE
    ids      [L][n][K] int    the chosen ones, best first
    gates    [L][n][K] int    their gates times 1000; 0: exactly zero, so no expert works

    neurons  int          infinity-MoE: width F of the hidden layer; its first masked one, if deep
    shown    [S] int      the neurons that `masks` holds: all, or as many as there is room for
    masks    [L] str      base64 of (n, K, ceil(S/8)) bytes: the neurons that a sample switches on
    own      [L][n] int   overlap in % between samples of one token; [L] None where K = 1
    overlap  [L][n][6] int    with samples of the token 1 to 6 places on; None past the end
    chance   [L] int      of two random masks

Overlap of two masks: the neurons that both switch on, in % of those that either does; here the
mean over pairs of samples.
Letters: L layers with experts, n tokens, K experts (or samples) of one token.
"""
import base64
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support.files import write_atomically
from support.results import keep_earlier
from support.routers import (
    another_choice,
    bank_numbers,
    find_layers,
    gates_and_ids,
    hooked,
    is_codes,
)
from support.tokenizer import alike, get_tokenizer

NEAR = 6  # neighbours on each side that a token's masks are compared with
MODEL_BYTES = 130_000  # of one infmoe model: two fit into a page of 300 kB


# --------------------------------------------------------------------------------------------------
# Collecting


@torch.no_grad()
def collect(model: nn.Module, tokenizer, tokens, name: str, **options) -> dict:
    """Watch one forward pass over tokens (n + 1,) -> the dictionary of this module's docstring.

    tokenizer: ours, or None: tokens are shown as numbers. options: further arguments of the
    forward pass. The model is in evaluation mode meanwhile, and left as it was.
    """
    layers, training = find_layers(model), model.training
    if not isinstance(tokens, torch.Tensor):
        tokens = torch.from_numpy(np.array(tokens, dtype=np.int64))  # a copy: shards are read-only
    tokens = tokens.to(next(model.parameters()).device, torch.int64)
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: one sequence of 2 or more")
    model.eval()
    try:
        outputs, loss = watch(model, layers, tokens, options)
        random = [losses_with(model, tokens, options, [(layer.router, random_choice(layer))])
                  for layer in layers]
    finally:
        model.train(training)
    *texts, following = spell(tokenizer, tokens.tolist())
    page = {"name": name, "tokens": texts, "next": following,
            "layers": [layer.index for layer in layers],
            "banks": bank_numbers(layers),
            "loss": loss, "random": random}
    if is_codes(outputs[0]):
        return page | neurons(layers, outputs)
    return page | experts(layers[0].n_experts, outputs)


def watch(model, layers, tokens, options):
    """-> what every router returned, and the loss of every token."""
    outputs = [None] * len(layers)

    def keeper(k):
        def keep(module, args, output):
            outputs[k] = output
        return keep

    hooks = [(layer.router, keeper(k)) for k, layer in enumerate(layers)]
    return outputs, losses_with(model, tokens, options, hooks)


def losses_with(model, tokens, options, hooks):
    """Loss in nats of predicting each token's successor while hooks are in place: n floats."""
    with hooked(hooks):
        logits = model(tokens[None, :-1], **options).logits[0]  # (n, V)
    losses = F.cross_entropy(logits.float(), tokens[1:].to(logits.device), reduction="none")
    if not losses.isfinite().all():
        raise ValueError("the model's loss is not finite: it has diverged, nothing to show")
    return [round(value, 3) for value in losses.tolist()]


def random_choice(layer):
    """A hook that makes a router choose at random, as probe.py does with seed 0."""
    def hook(module, args, output):
        some = next(code.z for code in output if code is not None) if is_codes(output) else (
            gates_and_ids(output)[1])
        return another_choice(layer, output, torch.arange(len(some), device=some.device))

    return hook


def experts(n_experts, outputs):
    """The part of the dictionary that discrete experts have."""
    page = {"experts": n_experts, "ids": [], "gates": []}
    for output in outputs:
        gates, ids = gates_and_ids(output)
        thousandths = (1000 * gates.float()).round().clamp_min(1)  # tiny is not zero
        thousandths = thousandths.masked_fill(gates == 0, 0)
        page["gates"].append(thousandths.int().tolist())
        page["ids"].append(ids.tolist())
    return page


def neurons(layers, outputs):
    """The part of the dictionary that infinity-MoE has."""
    page = {"experts": None, "masks": [], "own": [], "overlap": [], "chance": []}
    for layer, codes in zip(layers, outputs):
        mask = next(m for m in layer.experts.masks(codes) if m is not None)  # (n, K, F)
        on = (mask != 0).cpu().numpy().astype(np.float32)
        n, k, width = on.shape
        # losses and overlaps take about 33 bytes a token and layer; base64 has 6 bits a byte
        bits = 6 * (MODEL_BYTES - 33 * len(layers) * n)
        room = max(8, bits // (len(layers) * n * k))
        shown = np.linspace(0, width - 1, min(width, room)).round().astype(int)
        packed = np.packbits(on[:, :, shown] > 0, axis=-1)
        page["masks"].append(base64.b64encode(packed.tobytes()).decode())
        page["own"].append(own_overlap(on))
        page["overlap"].append(near_overlap(on))
        page["chance"].append(chance_overlap(on))
    return page | {"neurons": width, "shown": shown.tolist()}


def overlaps(a, b):
    """a, b (..., K, F) 0 or 1: overlap in % of each sample of a with each one of b (..., K, K)."""
    both = a @ b.swapaxes(-1, -2)
    either = a.sum(-1)[..., :, None] + b.sum(-1)[..., None, :] - both
    return 100 * both / np.maximum(either, 1)


def own_overlap(on):
    """on (n, K, F): between a token's samples, mean over the pairs."""
    first, second = np.triu_indices(on.shape[1], k=1)
    if len(first) == 0:
        return None
    return rounded(overlaps(on, on)[:, first, second].mean(-1))


def near_overlap(on):
    """on (n, K, F): with each of the NEAR next tokens, mean over pairs of samples."""
    rows = [[None] * NEAR for _ in on]
    for d in range(1, min(NEAR + 1, len(on))):
        for row, value in zip(rows, rounded(overlaps(on[:-d], on[d:]).mean((-1, -2)))):
            row[d - 1] = value
    return rows


def chance_overlap(on):
    """on (n, K, F): of two independent masks, each neuron on with the average share p."""
    p = on.mean()
    return round(float(100 * p / (2 - p)))


def rounded(values):
    return np.rint(values).astype(int).tolist()


def spell(tokenizer, ids):
    """The text of every token; bytes that are no character by themselves as \\xNN."""
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    spelled = [tokenizer.decode_bytes([i]) for i in ids]
    return [text.decode("utf-8", errors="backslashreplace") for text in spelled]


# --------------------------------------------------------------------------------------------------
# Writing


def write_page(path, models: list[dict]) -> None:
    """One self-contained HTML file, complete or not at all. models: what collect returned.

    ValueError if the models did not read the same text.
    """
    for other in models[1:]:
        if other["tokens"] != models[0]["tokens"]:
            raise ValueError(f"{models[0]['name']} and {other['name']} did not read the same "
                             "tokens: the page compares models token by token")
    # inside a script tag only "<" can end it or open a comment
    data = json.dumps(models, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    path, text = Path(path), template.replace("THE_DATA", data).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: f.write(text))


def write_subjects(folder, subjects, most):
    """page.html in a folder: the first held-out tokens of what probe.py looks at, `most` of them.

    ValueError where two models do not read a text alike.
    """
    first, readers = subjects[0], [reader(s.tokenizer) for s in subjects]
    if len(subjects) > 1 and (readers[0] is None or not alike(*readers)):
        names = [getattr(s.tokenizer, "name", s.tokenizer) for s in subjects]
        raise ValueError(f"{first.name} reads {names[0]} tokens, and {subjects[1].name} "
                         f"{names[1]}: the page compares token by token")
    length = min(most, *(s.windows.shape[1] - 1 for s in subjects))
    tokens = first.windows[0][:length + 1]
    models = [collect(s.model, r, tokens, s.name, **s.options) for s, r in zip(subjects, readers)]
    kept = keep_earlier(folder, "page")
    write_page(folder / "page.html", models)
    print(f"wrote {folder / 'page.html'}{kept}: open it in a browser\n")


def reader(tokenizer):
    """Something that decodes: ours does; transformers' is known by its model's name."""
    if not isinstance(tokenizer, str):
        return tokenizer
    try:
        return get_tokenizer(f"hf:{tokenizer}")
    except ValueError:  # none there: tokens are shown as numbers
        return None
