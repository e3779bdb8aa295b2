"""probe.py: it changes what it says, uniformly, and nothing for good; it counts as by hand."""
import collections
import itertools
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from probe_helpers import (
    CONTEXT,
    ROUTED,
    VOCAB,
    hf_model,
    random_model,
    save_checkpoint,
    saved,
    text_shards,
    tokens,
)
from train_helpers import ROOT, call, refused

import losses
import moe
import probe
from lab import continuous, evaluate
from lab import pathways as pathways_lab
from probe import ProbeConfig
from support import figures, hf, routers
from support.routers import Layer, find_layers
from support.subjects import Subject

TOPK = dict(arch="llama", flavour="topk", n_experts=6, d_expert=24, n_kv_head=2, n_layer=4)
OURS = {
    "topk": TOPK,
    # always-on experts; layers 1 and 3 only
    "deepseek": TOPK | dict(flavour="deepseek", moe_every=2),
    "unipool": dict(arch="llama", flavour="unipool", n_experts=12, top_k=2, n_layer=4),
    "infmoe": dict(arch="llama", flavour="infmoe", infmoe_dz=8, n_layer=4),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("probe") / "data", 20_000, 20_000)


def subject_of(model, windows=None):
    """As load_ours makes it, without files."""
    windows, c = tokens(6, CONTEXT + 1).numpy() if windows is None else windows, model.config
    return Subject("it", model, find_layers(model), c.n_layer, VOCAB, windows, None, {})


def routings_of(subject):
    return subject.model(torch.tensor(subject.windows[:, :-1]), return_routings=True).routings


def chosen(routing, none):
    """A layer's choices (T, K) as lists; `none` where the gate is zero."""
    pairs = zip(routing.ids.tolist(), routing.weights.tolist())
    return [[e if gate else none for e, gate in zip(*pair)] for pair in pairs]


def uniform(counts):
    """No chi-square test at 0.1 % speaks against it."""
    return scipy.stats.chisquare(list(counts)).pvalue > 1e-3


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- 1. Rerouting transformers' models: exactly the chosen layer, and bit for bit as before.

@pytest.mark.parametrize("family", ROUTED)
def test_one_layer_of_every_family(family, tmp_path, data):
    model = hf_model(family, num_hidden_layers=3)
    config = ProbeConfig(hf=saved(model, tmp_path), dataset=data, routing=True, tokens=4096,
                         device="cpu")
    subject = probe.load_hf(config)
    model, x = subject.model, torch.tensor(subject.windows[:, :-1])
    assert [layer.index for layer in subject.layers] == [0, 1, 2]["deepseek" in family:]
    assert {(layer.n_experts, layer.top_k) for layer in subject.layers} == {(6, 2)}
    before, weights = model(x).logits, {name: p.clone() for name, p in model.state_dict().items()}
    chosen = subject.layers[-2]
    given, passed = {}, {}  # what every router was given, and what its experts were then given

    def spy(layer):
        see = lambda _, args: given.update({layer.index: args[0]})
        note = lambda _, args, kwargs: passed.update({layer.index: [*args, *kwargs.values()]})
        return [layer.router.register_forward_pre_hook(see),
                layer.experts.register_forward_pre_hook(note, with_kwargs=True)]

    spies = [handle for layer in subject.layers for handle in spy(layer)]
    with probe.rerouted(subject, [chosen], "random"):
        changed = model(x).logits
    for handle in spies:
        handle.remove()
    for layer in subject.layers:
        pairs = [t for t in passed[layer.index] if t.shape[-1] == 2]
        ids = next(t for t in pairs if not t.is_floating_point())
        gates = next(t for t in pairs if t.is_floating_point())
        own = layer.router(given[layer.index])
        torch.testing.assert_close(gates, own[1], rtol=0, atol=0)  # learned gates everywhere
        if layer is not chosen:
            assert torch.equal(ids, own[2])
            continue
        assert not torch.equal(ids, own[2]) and (ids[:, 0] != ids[:, 1]).all()
        assert ids.min() >= 0 and ids.max() < 6
        assert uniform(torch.bincount(ids.flatten(), minlength=6))
    assert not torch.equal(changed, before)
    assert torch.equal(model(x).logits, before) and hooks_of(model) == 0
    check_replayed(subject, chosen)
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())


def check_replayed(subject, layer):
    """The same numbers, bit for bit, and blocks before the layer are not computed again."""
    measure = lambda: probe.held_out(subject, ProbeConfig(batch_size=4))
    with probe.rerouted(subject, [layer], "random"):
        plain = [measure(), measure()]
    blocks, ran = routers.find_blocks(subject.model), []
    spies = [next(block.children()).register_forward_pre_hook(lambda *_, i=i: ran.append(i))
             for i, block in enumerate(blocks)]
    with routers.replayed(blocks, layer.index, measure):
        ran.clear()
        with probe.rerouted(subject, [layer], "random"):
            assert np.array_equal([measure(), measure()], plain)
    assert set(ran) == set(range(layer.index, len(blocks)))
    measure()
    assert set(ran) == set(range(len(blocks)))
    for spy in spies:
        spy.remove()


@pytest.mark.parametrize("flavour", OURS)
def test_earlier_blocks_are_computed_once(flavour):
    subject = subject_of(random_model(**OURS[flavour]))
    for layer in subject.layers:
        check_replayed(subject, layer)


def test_other_architectures_are_named(tmp_path, data):
    words = r"LlamaForCausalLM has no router to ask: .* \*TopKRouter module, as Mixtral, OLMoE"
    with pytest.raises(ValueError, match=words):
        probe.load_hf(ProbeConfig(hf=saved(hf_model("llama"), tmp_path), dataset=data))


def test_a_router_that_returns_something_else_is_refused():
    for output in (torch.zeros(3, 2), (torch.zeros(3, 6), torch.zeros(3, 2)),
                   (torch.zeros(3, 6),) * 3):
        with pytest.raises(ValueError, match="does not return"):
            routers.gates_and_ids(output)


def test_transitions_are_grouped_by_where_experts_lead():
    """Four groups of 16 experts, shuffled: each is together again, in rows and in columns."""
    group, rng = np.arange(64) // 16, np.random.default_rng(0)
    rows, columns = rng.permutation(64), rng.permutation(64)
    counts = np.where(group[rows][:, None] == group[columns], 20.0, 0.2) + rng.random((64, 64))
    for order, names in zip(figures.grouped(counts), (rows, columns)):
        found = group[names[order]]
        assert sorted(order) == list(range(64)) and (found[1:] != found[:-1]).sum() == 3


def test_hooks_go_when_the_run_fails():
    subject = subject_of(random_model(**TOPK))
    rerouted = probe.rerouted(subject, subject.layers, "random")
    with pytest.raises(RuntimeError, match="boom"), rerouted:
        raise RuntimeError("boom")
    assert hooks_of(subject.model) == 0


# ---- 2. The draw itself.

def draw(how="random", n=6, k=2, size=6000, seed=0, among=None, gates="learned", keys=None,
         index=3):
    layer = Layer(index, None, None, None, n, k)
    weights = torch.rand(size, k, generator=torch.Generator().manual_seed(1))
    routing = moe.Routing(weights, torch.zeros(size, k, dtype=torch.int64), None, None)
    keys = torch.arange(size) if keys is None else keys
    return weights, routers.another_choice(layer, routing, keys, seed, among, gates)


def test_uniform_over_sets_and_order():
    _, new = draw()
    assert uniform(torch.bincount(new.ids.flatten(), minlength=6))
    pairs = collections.Counter(tuple(sorted(pair)) for pair in new.ids.tolist())
    # all pairs, none twice the same
    assert len(pairs) == 15 and uniform(pairs.values())
    ordered = torch.bincount((new.ids[:, 0] < new.ids[:, 1]).long(), minlength=2)
    # which gate goes to which is chance, too
    assert abs(ordered[0] - ordered[1]) < 4 * math.sqrt(6000)
    every = draw(n=4, k=4)[1].ids
    assert torch.equal(every.sort(-1).values, torch.arange(4).expand(6000, 4))


def test_layers_and_seeds_are_independent():
    first = draw(k=1)[1].ids[:, 0]
    for other in (draw(k=1, seed=1), draw(k=1, index=4)):
        assert uniform(torch.bincount(first * 6 + other[1].ids[:, 0], minlength=36))


def test_among_and_gates():
    among = torch.tensor([5, 0, 4, 2])
    weights, new = draw(k=2, among=among, gates="uniform")
    assert set(new.ids.flatten().tolist()) == set(among.tolist())
    assert (new.ids[:, 0] != new.ids[:, 1]).all()
    assert uniform(torch.bincount(new.ids.flatten())[among])
    torch.testing.assert_close(new.weights, weights.mean(-1, keepdim=True).repeat(1, 2))
    assert torch.equal(draw()[0], draw()[1].weights)


def test_hash_is_a_function_of_the_token():
    ids = torch.randint(0, 500, (6000,), generator=torch.Generator().manual_seed(2))
    new = draw(keys=ids)[1].ids
    table, pairs = {}, zip(ids.tolist(), new.tolist())
    assert all(table.setdefault(token, row) == row for token, row in pairs)
    assert uniform(np.bincount([row[0] for row in table.values()], minlength=6))


# ---- 3. infmoe: codes from N(0, I).

@pytest.mark.parametrize("settings", [
    {}, dict(infmoe_depth=2, infmoe_z="shared"), dict(infmoe_depth=2), dict(infmoe_mean=True),
    dict(infmoe_depth=2, infmoe_rate=(None, 0.5)), dict(infmoe_components=3, pool_groups=1)])
def test_codes_are_standard_normal(settings):
    subject = subject_of(random_model(**OURS["infmoe"] | settings))
    layer, x = subject.layers[1], torch.randn(2000, 32)
    own = layer.router(x, torch.arange(2000))
    new = routers.another_choice(layer, own, torch.arange(2000))
    assert [code is None for code in new] == [code is None for code in own]
    for code, learned in zip(new, own):
        if code:
            assert code.z.shape == learned.z.shape and code.mu is learned.mu
            assert not torch.equal(code.z, learned.z)
            n = code.z.numel()
            assert abs(code.z.mean()) < 4 / math.sqrt(n)
            assert abs(code.z.var() - 1) < 6 / math.sqrt(n)
            corr = torch.corrcoef(code.z.flatten(1).T)
            # samples and dimensions are independent
            assert (corr - torch.eye(len(corr))).abs().max() < 0.12
    if len(new) == 2 and all(new):
        assert torch.equal(new[0].z, new[1].z) == (settings.get("infmoe_z") == "shared")


# ---- 4. The random-router probe.

@torch.no_grad()
def test_held_out_is_the_mean_cross_entropy():
    subject = subject_of(random_model(**TOPK))
    values = probe.held_out(subject, ProbeConfig(batch_size=4))
    for window, (loss, accuracy) in zip(torch.tensor(subject.windows), values):
        logits = subject.model(window[None, :-1]).logits[0]
        assert loss == pytest.approx(F.cross_entropy(logits, window[1:]).item(), abs=1e-5)
        right = (logits.argmax(-1) == window[1:]).float().mean().item()
        assert accuracy == pytest.approx(100 * right, abs=1e-3)


@pytest.mark.parametrize("flavour", OURS)
@pytest.mark.parametrize("how", ["random", "hash", "skip"])
def test_results_do_not_depend_on_the_batch_and_nothing_stays(flavour, how):
    subject = subject_of(random_model(**OURS[flavour]))
    before = probe.held_out(subject, ProbeConfig(batch_size=2))
    values = []
    for n in (1, 4, 6):
        with probe.rerouted(subject, subject.layers[-2:], how, seed=1):
            values.append(probe.held_out(subject, ProbeConfig(batch_size=n)))
    np.testing.assert_allclose(values[0], values[1], atol=2e-4)
    np.testing.assert_allclose(values[0], values[2], atol=2e-4)
    assert np.abs(values[0] - before).max() > 1e-3
    assert np.array_equal(probe.held_out(subject, ProbeConfig(batch_size=2)), before)


def test_layers_rerouted_together_draw_independently():
    subject = subject_of(random_model(**TOPK), tokens(100, CONTEXT + 1).numpy())
    with probe.rerouted(subject, subject.layers, "random"):
        routings = routings_of(subject)
    for a, b in itertools.combinations([r.ids[:, 0] for r in routings], 2):
        assert uniform(torch.bincount(a * 6 + b, minlength=36))


@pytest.mark.parametrize("family", ["ours", "mixtral", "gpt_oss"])
def test_skip_is_a_layer_without_experts(family, tmp_path, data):
    """transformers' blocks return a tensor, or a tuple."""
    if family == "ours":
        subject = subject_of(random_model(**OURS["deepseek"]))
        always_on = subject.model.blocks[3].ffn.shared.parameters()
    else:
        subject, always_on = probe.load_hf(ProbeConfig(
            hf=saved(hf_model(family), tmp_path), dataset=data, tokens=64, device="cpu")), []
    model, x = subject.model, tokens()
    with probe.rerouted(subject, [subject.layers[1]], "skip"):
        skipped = model(x).logits
    for p in (*subject.layers[1].experts.parameters(), *always_on):
        p.data.zero_()
    torch.testing.assert_close(skipped, model(x).logits)


def run(tmp_path, name="probe", **settings):
    """probe.probe as the command line calls it -> the JSON file of the first probe asked for."""
    probe.probe(ProbeConfig(save_dir=str(tmp_path / name), device="cpu", **settings))
    asked = [key for key in ("routing", "overlap", "pathways", "samples") if settings.get(key)]
    return json.loads((tmp_path / name / f"{(asked or ['random_router'])[0]}.json").read_text())


def ours_and_the_export(tmp_path, data, model):
    """What chooses a model of ours, and its export to transformers, as settings of run()."""
    hf.export(model, tmp_path / "theirs")
    return (dict(out_dir=save_checkpoint(model, tmp_path / "ours", data)),
            dict(hf=str(tmp_path / "theirs"), dataset=data))


def test_ours_and_the_export_give_the_same_numbers(tmp_path, data):
    a, b = ours_and_the_export(tmp_path, data, random_model(**TOPK))
    settings = dict(random_router_from=True, choice="both", matched_experts=3, seeds=2, tokens=2048)
    ours = run(tmp_path, "a", **a, batch_size=16, **settings)
    theirs = run(tmp_path, "b", **b, batch_size=5, **settings)
    # random, matched, hash, skipped; layers 2, 3, mean
    assert len(ours["rows"]) == len(theirs["rows"]) == 4 * 3
    for mine, other in zip([ours["learned"], *ours["rows"]], [theirs["learned"], *theirs["rows"]]):
        assert mine == pytest.approx(other, abs=2e-4)
    use = [run(tmp_path, "c", **which, routing=True)["use"] for which in (a, b)]
    assert use[0] == use[1]


def test_rows_are_means_over_windows_seeds_and_layers(tmp_path, data):
    folder = save_checkpoint(random_model(**OURS["unipool"]), tmp_path / "ours", data)
    settings = dict(out_dir=folder, random_router_from=2, seeds=2, tokens=512, controls="skip")
    rows, config = run(tmp_path, **settings)["rows"], ProbeConfig(**settings, device="cpu")
    subject = probe.load_ours(config)
    base, change = probe.held_out(subject, config), {}
    for layer, seed in itertools.product((2, 3), (0, 1)):
        with probe.rerouted(subject, [subject.layers[layer]], "random", seed):
            change[layer, seed] = probe.held_out(subject, config) - base
    for row, keys in zip(rows, ([(2, 0), (2, 1)], [(3, 0), (3, 1)], list(change))):
        windows = sum(change[key] for key in keys) / len(keys)  # (16, 2)
        assert row["router"] == "random of 12" and row["seeds"] == 2
        for j, column in enumerate(("loss", "accuracy")):
            w = windows[:, j]
            error = math.sqrt(sum((w - w.mean()) ** 2) / 15 / 16)
            assert row[f"{column}_change"] == pytest.approx(w.mean())
            assert row[f"{column}_error"] == pytest.approx(error)
            assert row[column] == pytest.approx(base[:, j].mean() + w.mean())
            a, b = (np.mean([change[k][:, j].mean() for k in keys if k[1] == seed])
                    for seed in (0, 1))
            # of two values
            assert row[f"{column}_error_over_seeds"] == pytest.approx(abs(a - b) / 2)


def test_all_at_once(tmp_path, data):
    folder = save_checkpoint(random_model(**TOPK), tmp_path / "ours", data)
    rows = run(tmp_path, out_dir=folder, random_router_from=0, all_at_once=True, tokens=512,
               seeds=1)["rows"]
    assert [row["router"] for row in rows] == ["random of 6", "hash", "skipped"]
    assert {row["layer"] for row in rows} == {"together"}
    subject = probe.load_ours(ProbeConfig(out_dir=folder, tokens=512, device="cpu"))
    with probe.rerouted(subject, subject.layers, "hash"):
        expected = probe.held_out(subject, ProbeConfig())[:, 0].mean()
    assert rows[1]["loss"] == pytest.approx(expected, abs=1e-4)


def test_matched_is_the_most_used(tmp_path, data):
    folder = save_checkpoint(random_model(**OURS["unipool"]), tmp_path / "ours", data)
    config = ProbeConfig(out_dir=folder, random_router_from=True, choice="matched",
                         matched_experts=3, tokens=512, device="cpu")
    subject = probe.load_ours(config)
    among = probe.interventions(subject, config)["random of top 3"][1]
    routings = routings_of(subject)
    for k, layer in enumerate(subject.layers):
        counts = collections.Counter(itertools.chain(*chosen(routings[k], none=None)))
        few = set(among[layer.index].tolist())
        others = [counts[e] for e in range(12) if e not in few]
        assert len(few) == 3 and min(counts[e] for e in few) >= max(others)


def test_a_locked_model_draws_from_what_a_layer_owns(tmp_path, data):
    model = random_model(**OURS["unipool"] | dict(flavour="lock", top_k=1, lock_steps=0))
    config = ProbeConfig(out_dir=save_checkpoint(model, tmp_path / "ours", data), tokens=256,
                         random_router_from=True, choice="both", device="cpu")
    subject = probe.load_ours(config)
    kinds = probe.interventions(subject, config)
    own = [set((layer.router.lost < 1).nonzero().flatten().tolist()) for layer in subject.layers]
    size, = set(map(len, own))
    for name in (f"random of {size}", f"random of top {size}", "hash"):
        among = kinds[name][1]
        assert [set(among[layer.index].tolist()) for layer in subject.layers] == own


def test_on_benchmarks(tmp_path, data, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from test_evaluate import TOY
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(TOY.parent.parent)
    folder = save_checkpoint(random_model(**OURS["unipool"]), tmp_path / "ours", data)
    found = run(tmp_path, out_dir=folder, random_router_from=3, tasks="toy", include_path=str(TOY),
                limit=25, seeds=2, controls="skip")
    assert set(found["learned"]) == {"accuracy"} and len(found["rows"]) == 2  # one layer: no mean
    subject = probe.load_ours(ProbeConfig(out_dir=folder, device="cpu"))
    with probe.rerouted(subject, subject.layers[-1:], "skip"):
        lm = evaluate.language_model(subject.model, subject.tokenizer)
        accuracy = evaluate.run(lm, "toy", str(TOY), limit=25)["toy"]["acc_norm"]
    assert found["rows"][1]["accuracy"] == pytest.approx(100 * accuracy)
    change = 100 * accuracy - found["learned"]["accuracy"]
    assert found["rows"][1]["accuracy_change"] == pytest.approx(change)


# ---- 5. Use, overlap, pathways.

def test_record_equals_the_routings():
    subject = subject_of(random_model(**OURS["unipool"]))
    ids, entropy = probe.record(subject, ProbeConfig(batch_size=4))
    routings = routings_of(subject)
    assert any((r.weights == 0).any() for r in routings)
    for k, r in enumerate(routings):
        assert ids[k].tolist() == chosen(r, none=12)
        assert entropy[k] == pytest.approx(losses.routing_entropy(r.scores).item(), abs=1e-5)


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_expert_use(groups, tmp_path, data):
    settings = OURS["unipool"] | dict(pool_groups=groups) if groups else TOPK
    folder = save_checkpoint(random_model(**settings), tmp_path / "ours", data)
    found = run(tmp_path, out_dir=folder, routing=True, tokens=1024)
    subject = probe.load_ours(ProbeConfig(out_dir=folder, tokens=1024, device="cpu"))
    routings = routings_of(subject)
    n = subject.layers[0].n_experts
    use = [[sum(row.count(e) for row in chosen(r, none=n)) for e in range(n + 1)] for r in routings]
    none, use = [u[n] for u in use], [u[:n] for u in use]
    assert found["use"] == use and all(sum(u) + z == 1024 * 2 for u, z in zip(use, none))
    assert [row["no expert"] for row in found["rows"][:4]] == [round(z / 2048, 4) for z in none]
    assert any(none) == bool(groups)  # NormRouter's scores can all be zero, a softmax's not
    pools = {0: [], 1: ["0 to 3"], 2: ["0 to 1", "2 to 3"]}[groups]
    assert [row["layer"] for row in found["rows"]] == ["0", "1", "2", "3", *pools]
    together = [np.sum(use[:4 // groups], 0).tolist()] if groups else []
    for row, counts in zip(found["rows"], use + together):
        q = [c / sum(counts) for c in counts]
        entropy = -sum(p * math.log(p) for p in q if p) / math.log(len(q))
        assert row["entropy of use"] == pytest.approx(entropy, abs=1e-4)
        assert row["largest"] == pytest.approx(max(q) * len(q), abs=0.01)
        assert row["unused"] == counts.count(0)
    if groups:
        layers = 4 // groups
        paths = [chosen(r, none=n) for r in routings]
        met = []
        for g, t in itertools.product(range(groups), range(1024)):
            seen = {e for path in paths[g * layers:(g + 1) * layers] for e in path[t]}
            met.append(len(seen - {n}) / (2 * layers))
        assert next(iter(found["facts"].values())) == pytest.approx(np.mean(met), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, dict(infmoe_depth=2), dict(pool_groups=1)])
def test_neuron_use(settings):
    subject = subject_of(random_model(**OURS["infmoe"] | settings))
    rows, use, banks, _ = continuous.neuron_use(subject, ProbeConfig(batch_size=2))
    codes = routings_of(subject)
    places = itertools.product(range(4), range(settings.get("infmoe_depth", 1)))
    for row, counts, (k, i) in zip(rows, use, places):
        masks, code = subject.layers[k].experts.masks(codes[k])[i], codes[k][i]  # (T, K, F)
        assert counts.tolist() == (masks != 0).sum((0, 1)).tolist()
        assert row["sigma"] == pytest.approx((code.logvar / 2).exp().mean().item(), abs=1e-3)
        spread = code.mu[:, 0].std(0, correction=0).mean().item()
        assert row["spread of mu"] == pytest.approx(spread, abs=1e-3)
    assert sorted(r for bank in banks for r in bank) == list(range(len(rows)))
    assert len(banks) == (1 if "pool_groups" in settings else len(rows))


def test_overlap_of_ours_and_of_the_export(tmp_path, data):
    model, seen = random_model(**TOPK), {}
    both = ours_and_the_export(tmp_path, data, model)
    ours, theirs = (run(tmp_path, name, **which, overlap=True, tokens=256)
                    for name, which in zip("ab", both))
    assert ours["overlap"] == pytest.approx(theirs["overlap"], abs=1e-4)
    windows = probe.load_ours(ProbeConfig(**both[0], tokens=256, device="cpu")).windows[:, :-1]
    model.blocks[1].ffn.register_forward_hook(
        lambda _, args, out: seen.update(x=args[0], routing=out[1]))
    model(torch.tensor(windows))
    bank, cosines = model.blocks[1].ffn.bank, []
    for x, ids in zip(seen["x"], seen["routing"].ids):
        a, b = (F.silu(h[:24]) * h[24:] for h in (bank.w_in[e] @ x for e in ids))
        cosines.append((a @ b / a.norm() / b.norm()).abs().item())
    assert ours["overlap"][1] == pytest.approx(np.mean(cosines), abs=1e-4)


def test_one_probe_fails_and_the_others_go_on(tmp_path, data, monkeypatch, capsys):
    theirs = saved(hf_model("gpt_oss"), tmp_path / "x")
    ours = save_checkpoint(random_model(**OURS["unipool"] | dict(top_k=1)), tmp_path / "y", data)
    for source, words in ((f"--hf={theirs}", "GptOssExperts"), (f"--out_dir={ours}", "uses one")):
        options = ["--overlap", "--pathways", "--tokens=64", f"--save_dir={tmp_path}/z",
                   f"--dataset={data}"]
        code, _, error = call(probe.main, [source, *options, "--device=cpu"], monkeypatch, capsys)
        error = error.splitlines()
        assert code == 2 and [line for line in error if words in line] == error[-1:]
        assert error[-1].startswith("error: --overlap: ")
        assert [path.name for path in (tmp_path / "z").glob("*.json")] == ["pathways.json"]
        (tmp_path / "z" / "pathways.json").unlink()


def test_an_earlier_probe_is_kept(tmp_path, data, monkeypatch, capsys):
    """Its numbers and its picture; where there are links, what they point to."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder, out = save_checkpoint(random_model(**TOPK), tmp_path / "x", data), tmp_path / "y"
    options = dict(out_dir=folder, routing=True)
    first = run(tmp_path, "y", tokens=64, **options)
    picture = (out / "routing.png").read_bytes()
    assert "the one before" not in capsys.readouterr().out
    second = run(tmp_path, "y", tokens=256, **options)
    assert "the one before is now routing-1" in capsys.readouterr().out
    assert second["held_out_tokens"] == 256
    assert json.loads((out / "routing-1.json").read_text()) == first
    assert (out / "routing-1.png").read_bytes() == picture != (out / "routing.png").read_bytes()
    for name in ("routing.json", "routing.png"):
        (out / name).unlink()
        (tmp_path / name).write_text("theirs")
        (out / name).symlink_to(tmp_path / name)
    run(tmp_path, "y", tokens=64, **options)
    assert all((tmp_path / name).read_text() == "theirs"
               for name in ("routing.json", "routing.png"))
    assert not (out / "routing.json").is_symlink() and (out / "routing-2.png").is_symlink()


def test_ctrl_c_is_one_line(tmp_path, data):
    folder = save_checkpoint(random_model(**TOPK), tmp_path / "x", data)
    options = [f"--out_dir={folder}", "--random_router_from", "--seeds=100000", "--device=cpu"]
    going = subprocess.Popen([sys.executable, "-u", "probe.py", *options], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert folder in going.stdout.readline()
    os.kill(going.pid, signal.SIGINT)
    error = going.communicate(timeout=60)[1].strip()
    assert going.returncode == 130 and error == "stopped by Ctrl-C: what is written is whole"


def test_weights_that_are_no_numbers(tmp_path, data, monkeypatch, capsys):
    model = random_model(**TOPK)
    model.blocks[2].ffn.router.weight.data[0, 0] = math.nan
    folder = save_checkpoint(model, tmp_path / "x", data)
    words = [f"--out_dir={folder}", "--routing", "--device=cpu"]
    error = refused(probe.main, words, monkeypatch, capsys)
    assert "NaN or infinite" in error and folder in error
    subject = subject_of(random_model(**TOPK))
    save = probe.saver(subject, ProbeConfig(save_dir=str(tmp_path / "y")))
    with pytest.raises(ValueError, match="JSON"):
        save("routing", {"rows": [math.nan]}, None)
    assert not (tmp_path / "y").exists()


def test_overlap_of_samples(tmp_path, data):
    found = run(tmp_path, out_dir=save_checkpoint(random_model(**OURS["infmoe"]), tmp_path / "x",
                                                  data), overlap=True, tokens=64)
    assert all(0 < value < 1 for value in found["overlap"])


@pytest.mark.parametrize("flavour", ["topk", "unipool"])
def test_pathways(flavour, tmp_path, data):
    folder = save_checkpoint(random_model(**OURS[flavour]), tmp_path / "ours", data)
    found = run(tmp_path, out_dir=folder, pathways=True, tokens=2048, devices=3)
    subject = probe.load_ours(ProbeConfig(out_dir=folder, tokens=2048, device="cpu"))
    n = subject.layers[0].n_experts
    ids = torch.tensor([chosen(r, none=n) for r in routings_of(subject)])
    for k in range(3):
        after = collections.defaultdict(collections.Counter)
        for a, b in zip(ids[k, :, 0].tolist(), ids[k + 1, :, 0].tolist()):
            after[a][b] += 1
        usual = sum(c.most_common(1)[0][1] for c in after.values())
        assert found["path_consistency"][k] == pytest.approx(usual / 2048)
        likeliest = torch.bincount(ids[k + 1, :, 0]).max().item()
        assert found["chance"][k] == pytest.approx(likeliest / 2048)
    hops = [(a * 3 // n, b * 3 // n) for k in range(3) for t in range(1024, 2048)
            for a in ids[k, t].tolist() for b in ids[k + 1, t].tolist() if n not in (a, b)]
    assert found["crossing"]["in order"] == pytest.approx(np.mean([a != b for a, b in hops]))
    assert len(found["cache_hit_rate"]) == (n if flavour == "unipool" else 4 * n)


def test_partition_finds_planted_groups_and_keeps_sizes():
    rng = np.random.default_rng(0)
    # private banks, one pool, two pools
    for pairs in ([(0, 1), (1, 2)], [(0, 0)], [(0, 0), (0, 1), (1, 1)]):
        group = {bank: rng.permutation(12) % 3 for bank in (0, 1, 2)}
        traffic = {(a, b): 1.0 + 50 * (group[a][:, None] == group[b][None, :]) for a, b in pairs}
        plain = {bank: np.arange(12) // 4 for bank in {x for pair in pairs for x in pair}}
        found = pathways_lab.partition(traffic, plain, 3)
        assert all(np.bincount(devices).tolist() == [4, 4, 4] for devices in found.values())
        assert pathways_lab.crossings(traffic, found) < 0.6 * pathways_lab.crossings(traffic, plain)
        # the argument is left alone
        assert all((devices == np.arange(12) // 4).all() for devices in plain.values())


def test_partition_is_a_local_optimum():
    """No swap of two experts of a bank could still help; counted literally."""
    rng = np.random.default_rng(1)
    traffic = {(0, 0): rng.random((7, 7)), (0, 1): rng.random((7, 7)) ** 3,
               (1, 1): rng.random((7, 7))}
    plain = {bank: np.arange(7) * 3 // 7 for bank in (0, 1)}  # sizes 3, 2, 2
    found = pathways_lab.partition(traffic, plain, 3)
    best = pathways_lab.crossings(traffic, found)
    assert best < pathways_lab.crossings(traffic, plain)
    for bank, (i, j) in itertools.product((0, 1), itertools.combinations(range(7), 2)):
        other = {b: devices.copy() for b, devices in found.items()}
        other[bank][[i, j]] = other[bank][[j, i]]
        assert pathways_lab.crossings(traffic, other) >= best - 1e-12


def test_cache_hits_equal_a_cache():
    sequence = np.random.default_rng(0).zipf(1.5, 3000) % 11
    hits = pathways_lab.cache_hits(sequence, 11)
    for size in range(1, 12):
        cache, found = collections.OrderedDict(), 0
        for expert in sequence.tolist():
            found += expert in cache
            cache.pop(expert, None)
            cache[expert] = True
            if len(cache) > size:
                cache.popitem(last=False)
        assert hits[size - 1] == pytest.approx(found / 3000)


def test_accesses_are_in_the_order_of_decoding():
    ids = np.array([[[0, 1], [2, 3]], [[1, 0], [3, 2]]], dtype=np.int16)  # (L = 2, T = 2, K = 2)
    assert pathways_lab.accesses(ids, [0, 0], 4).tolist() == [0, 1, 1, 0, 2, 3, 3, 2]  # a pool
    assert pathways_lab.accesses(ids, [0, 1], 4).tolist() == [0, 1, 5, 4, 2, 3, 7, 6]
    ids[0, 0, 1] = ids[1, 1, 0] = 4  # no expert
    assert pathways_lab.accesses(ids, [0, 1], 4).tolist() == [0, 5, 4, 2, 3, 6]


# ---- 6. Samples.

def test_samples(tmp_path, data):
    settings = OURS["infmoe"] | dict(infmoe_depth=2, infmoe_mean_from=1)
    folder = save_checkpoint(random_model(**settings), tmp_path / "x", data)
    rows = run(tmp_path, out_dir=folder, samples=(1, 2, 5), tokens=512)["rows"]
    subject = probe.load_ours(ProbeConfig(out_dir=folder, tokens=512, device="cpu"))
    assert [row["K"] for row in rows] == [1, 2, 5, "z = mu"] and rows[1]["loss_change"] == 0
    for row, change in zip(rows, ((1, False), (2, False), (5, False), (2, True))):
        subject.model.set_samples(*change)
        expected = probe.held_out(subject, ProbeConfig())[:, 0].mean()
        assert row["loss"] == pytest.approx(expected, abs=1e-5)


def test_samples_are_as_before_afterwards():
    subject = subject_of(random_model(**OURS["infmoe"]))
    before = probe.held_out(subject, ProbeConfig())
    continuous.samples(subject, ProbeConfig(samples=(4,)), lambda *_: None)
    assert np.array_equal(probe.held_out(subject, ProbeConfig()), before)


# ---- 7. The command line.

@pytest.mark.parametrize("argv, files, words", [
    ([], {"random_router", "routing"}, "layer"),
    (["--random-router-from", "3", "--seeds=1"], {"random_router"}, "3 "),
    (["--random-router-from", "--seeds", "1"], {"random_router"}, "mean"),
    (["--random_router_from=0", "--seeds=1", "--all-at-once"], {"random_router"}, "together"),
    (["--routing", "--overlap", "--pathways"], {"routing", "overlap", "pathways"},
     "path consistency"),
])
def test_newest_checkpoint_and_files(argv, files, words, tmp_path, data, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    save_checkpoint(random_model(n_layer=1), tmp_path / "out" / "older", data)
    os.utime(tmp_path / "out" / "older" / "ckpt.pt", (1, 1))
    save_checkpoint(random_model(**OURS["unipool"]), tmp_path / "out" / "newer", data)
    options = ["--tokens=256", "--device=cpu", *argv]
    code, printed, _ = call(probe.main, options, monkeypatch, capsys)
    assert code == 0 and words in printed and "out/newer" in printed
    assert {path.stem for path in (tmp_path / "out" / "newer").glob("*.json")} == files
    for name in files:
        found = json.loads((tmp_path / "out" / "newer" / f"{name}.json").read_text())
        assert found["held_out_tokens"] == 256
        assert (tmp_path / "out" / "newer" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("settings, argv, words", [
    ({}, ["--routing"], "is dense"),
    (TOPK, ["--random-router-from=-1"], "leaves nothing"),
    (TOPK | dict(top_k=3), ["--random-router-from", "--choice=matched", "--matched_experts=2"],
     "raise --matched_experts"),
    (TOPK, ["--samples=1,2"], "draws none"),
    (TOPK, ["--samples=0"], "samples=(0,)"),
    (TOPK, ["--pathways", "--devices=7"], "devices=7"),
    (TOPK, ["--dataset=nowhere"], "no data in 'nowhere'"),
    (TOPK, ["--random-router-form=3"], "did you mean --random_router_from"),
    (TOPK, ["--hf=x"], "one model at a time"),
    (OURS["infmoe"], ["--random-router-from", "--choice=matched"], "infmoe has neither"),
    (OURS["infmoe"], ["--pathways"], "discrete experts"),
    (OURS["infmoe"] | dict(infmoe_mean=True), ["--samples=2"], "draws none"),
])
def test_mistakes_are_one_line(settings, argv, words, tmp_path, data, monkeypatch, capsys):
    folder = save_checkpoint(random_model(**settings), tmp_path / "x", data)
    options = [f"--out_dir={folder}", "--tokens=64", "--device=cpu", *argv]
    error = refused(probe.main, options, monkeypatch, capsys)
    assert error.startswith("error: ") and words in error


def test_nothing_to_probe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, words in ((["--routing", "--train=never"], "no checkpoint under out/"),
                        (["--hf=x"], "--hf needs --dataset")):
        assert words in refused(probe.main, argv, monkeypatch, capsys)


def test_a_text_file_as_dataset(tmp_path, data):
    text = tmp_path / "notes.txt"
    text.write_text("def f(x):\n    return x\n" * 40)
    folder = save_checkpoint(random_model(**TOPK), tmp_path / "ours", data)
    config = ProbeConfig(out_dir=folder, dataset=str(text), tokens=300, device="cpu")
    windows, ids = probe.load_ours(config).windows, list(text.read_bytes())[:301]
    starts = range(0, 300 - CONTEXT + 1, CONTEXT)
    assert windows.tolist() == [ids[i:i + CONTEXT + 1] for i in starts]


def test_without_matplotlib(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(tmp_path, out_dir=save_checkpoint(random_model(**TOPK), tmp_path / "ours", data),
        routing=True, tokens=64)
    assert 'pip install -e ".[plot]"' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flavour", OURS)
def test_every_probe_of_every_flavour(flavour, tmp_path, data, monkeypatch, capsys):
    folder = save_checkpoint(random_model(**OURS[flavour]), tmp_path / "x", data)
    last = "--samples=1,4" if flavour == "infmoe" else "--pathways"
    argv = [f"--out_dir={folder}", "--tokens=512", "--device=cpu", "--random-router-from",
            "--routing", "--overlap", last]
    assert call(probe.main, argv, monkeypatch, capsys)[1].count("wrote ") == 4
