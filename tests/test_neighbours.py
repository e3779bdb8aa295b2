"""Neighbours of the papers' methods: UniPool-lock, ReMoE, PEER, MoRE; what every flavour must
survive is in test_flavours.py, test_train.py and test_distributed.py, by the registries."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moe_helpers import build, random_tokens, real_text, small, train, training_loss
from scipy.optimize import linear_sum_assignment
from train_helpers import assert_same_state, checkpoint, tiny_run

import losses
import moe
from model import GPT
from support import lock, ops, report

# ---- 1. UniPool-lock: who owns what


@pytest.mark.parametrize("n_layers, own, seed", [(2, 1, 0), (3, 2, 1), (5, 4, 2), (12, 8, 3),
                                                 (24, 4, 4), (4, 3, 5)])
def test_assignment_is_the_best(n_layers, own, seed):
    """Against scipy's Hungarian method, each layer `own` times; ties and empty rows included."""
    rng = np.random.default_rng(seed)
    shares = rng.random((n_layers, n_layers * own)) ** 6
    if seed == 5:
        shares = np.round(shares, 1)
        shares[1] = 0
    owner = lock.assign(shares)
    assert np.bincount(owner, minlength=n_layers).tolist() == [own] * n_layers
    rows, columns = linear_sum_assignment(-np.repeat(shares, own, axis=0))
    best = np.repeat(shares, own, axis=0)[rows, columns].sum()
    assert shares[owner, np.arange(len(owner))].sum() == pytest.approx(best, rel=1e-9)


LOCK = dict(flavour="lock", n_layer=4, pool_groups=2, n_experts=8, top_k=2, lock_steps=4)


def off(model):
    return torch.stack([layer.router.lost for layer, _ in model.expert_layers()])  # (L, M)


def test_schedule_by_step():
    """Nothing until step n, then a cosine on others' experts until 2n; they are never used again;
    what was seen decides, in each pool by itself."""
    model = build(**LOCK)
    c, step = model.config, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 12):
        output = model.train()(*real_text(2, 16, seed=step))
        training_loss(output).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step > 2 * c.lock_steps:  # counts of this step, which the lock of step 2n governs
            assert not output.stats["counts"][off(model) == 1].any()
            assert (output.stats["counts"].sum(1) == 2 * 2 * 16).all()
        model.update_balance(output.stats, step)
        fade = 0.5 - 0.5 * math.cos(math.pi * min(1, (step + 1 - 4) / 4))
        levels = off(model).unique().tolist()
        assert levels == pytest.approx([0.0] if step < 4 else [0.0, fade], abs=1e-6)
        if step == 4:
            seen = torch.stack([layer.router.seen for layer, _ in model.expert_layers()])
            owners = [lock.assign(part.double().numpy()) for part in seen.split(2)]
            wanted = np.concatenate([o == np.arange(2)[:, None] for o in owners])
            assert ((off(model) == 0).numpy() == wanted).all()
    kept = off(model) == 0
    assert kept.sum(1).tolist() == [4] * 4  # K = M / L
    assert (kept[0] ^ kept[1]).all() and (kept[2] ^ kept[3]).all()
    biases = [layer.router.bias for layer, _ in model.expert_layers()]
    assert torch.equal(torch.stack(biases) < -1e8, ~kept)


def test_locked_scores_leave_the_norm_as_it_was():
    router = moe.LockRouter(8, 6, 2).double()
    router.init_weights(1.0)
    x, away = torch.randn(5, 8).double(), torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    whole = router(x)
    lock.take_away(router, away, 1.0)
    locked = router(x)
    torch.testing.assert_close(locked.scores, whole.scores * ~away)
    assert not away[locked.ids].any()  # not even by ties


def test_lock_loss_is_the_literal_one_and_warms_up():
    """coef / L * sum_l (H_l - log K)^2, its gradient that of the mean over all ranks."""
    model, tokens = build(**LOCK, lock_coef=0.5).double(), random_tokens(2, 16)
    output = model.train()(tokens, tokens, return_routings=True)
    total = 0
    for r in output.routings:
        q = r.scores.mean(0) / r.scores.mean(0).sum()
        total = total + (-torch.special.xlogy(q, q + 1e-12).sum() - math.log(4)) ** 2
    weights = [layer.router.weight for layer, _ in model.expert_layers()]
    literal = 0.5 * total / 4 / 4  # the first of four steps of warm-up
    assert output.aux["lock"].item() == pytest.approx(literal.item(), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(loss, weights, retain_graph=True)
                      for loss in (output.aux["lock"], literal))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
    for layer, _ in model.expert_layers():
        layer.router.steps += 9
    assert model(tokens, tokens).aux["lock"].item() == pytest.approx(4 * literal.item(), rel=1e-5)
    assert losses.cardinality_loss(torch.tensor([1.0, 1, 0, 0]), 2).item() == pytest.approx(0)


def test_a_random_allocation_from_the_start():
    model = build(**LOCK | dict(lock_steps=0, pool_groups=1, n_experts=12))
    assert (off(model) == 0).sum(1).tolist() == [3] * 4 and (off(model) == 0).sum(0).max() == 1
    before = off(model).clone()
    train(model, 3)
    assert torch.equal(off(model), before)


def test_resume_across_both_boundaries(data, tmp_path, command):
    """Owners at step 3, alone from step 6: stopped before, at and after each, bit for bit."""
    run = dict(flavour="lock", max_steps=8, lock_steps=3, warmup_steps=0, min_lr=1e-3)
    tiny_run(data, tmp_path / "whole", **run)
    for stop in (2, 3, 4, 5, 6, 7):
        tiny_run(data, tmp_path / f"{stop}", **run | dict(max_steps=stop))
        tiny_run(data, tmp_path / f"{stop}", **run, init_from="resume")
        for part in ("model", "optimizer"):
            assert_same_state(*(checkpoint(tmp_path / out)[part] for out in ("whole", f"{stop}")))
    saved = checkpoint(tmp_path / "whole")["model"]
    buffers = {name for name in saved if name.endswith((".lost", ".bias"))}
    assert sorted(saved["blocks.0.ffn.router.lost"].tolist()) == [0.0] * 3 + [1.0] * 3
    # a new run from it: its experts keep their owners, whatever lock_steps would be
    train_on = dict(run, lock_steps=2, max_steps=2, init_from=str(tmp_path / "whole"))
    assert command(data, tmp_path / "new", **train_on)[0] == 0
    new = checkpoint(tmp_path / "new")["model"]
    assert buffers and all(torch.equal(saved[name], new[name]) for name in buffers)


def test_lock_steps_follow_the_length_of_the_run(data, tmp_path, command):
    """Also where the flavour's name is another's."""
    assert command(data, tmp_path, "unipool", router="lock", max_steps=2)[0] == 0
    assert torch.load(tmp_path / "ckpt.pt")["model_config"]["lock_steps"] == 1


# ---- 2. ReMoE: sparsity by an adaptive coefficient


def test_the_l1_coefficient_follows_eq_8():
    """1.2 times more while too many work, less while too few; the same in all layers."""
    model = build(flavour="remoe", n_experts=4, top_k=1)
    tokens, expected = random_tokens(2, 16), 0
    for step in range(1, 6):
        output = model.train()(tokens, tokens, return_routings=True)
        busy = np.mean([(r.weights > 0).float().mean().item() for r in output.routings])
        scores = [r.scores for r in output.routings]
        counts = [(s > 0).sum(0) for s in scores]
        l1 = sum(4 * (s.mean(0) * n / n.sum()).sum() for s, n in zip(scores, counts))
        assert output.aux["balance"].item() == pytest.approx(1e-8 * 1.2**expected * l1.item(), 1e-4)
        assert output.stats["counts"].sum(1).tolist() == [n.sum().item() for n in counts]
        expected += int(np.sign(busy - 1 / 4))
        model.update_balance(output.stats, step)
        assert all(layer.router.ups.item() == expected for layer, _ in model.expert_layers())
    nobody = [torch.zeros(3, 4)], [torch.zeros(4)]
    assert losses.pool_loss(*nobody) == 0  # and no NaN


def test_sparsity_reaches_its_target():
    model = build(flavour="remoe", n_experts=8, top_k=2, balance_coef=1e-3)
    train(model, 80, lr=3e-3)
    output = model.train()(*real_text(8, 16, seed=99))
    busy = output.stats["counts"].sum() / output.stats["tokens"] / 8 / 2
    assert 0.1 < busy < 0.4  # 2 of 8; at the start a half


# ---- 3. PEER: product keys, experts of one neuron


@pytest.mark.parametrize("n_experts, top_k, a", [(16, 4, 4), (12, 5, 3), (7, 3, 1), (64, 32, 8)])
def test_product_keys_find_the_best_pairs(n_experts, top_k, a):
    """Against all E sums; two heads at K = 32."""
    router = moe.ProductRouter(16, n_experts, top_k).double()
    router.init_weights(1.0)
    x = torch.randn(9, 16).double()
    routing, heads = router(x), max(1, top_k // 16)
    assert router.first.shape[0] == a
    q = (x @ router.query.T).view(9, heads, 2, -1)
    q = q / (q.square().mean(-1, keepdim=True) + torch.finfo(q.dtype).eps).sqrt()
    sums = (q[:, :, 0] @ router.first.T)[..., None] + (q[:, :, 1] @ router.second.T)[..., None, :]
    best, ids = sums.flatten(2).topk(top_k // heads)
    assert torch.equal(routing.ids, ids.flatten(1))
    torch.testing.assert_close(routing.weights, best.sigmoid().flatten(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gathered_rows_equal_the_plain_sums(dtype):
    """Products and sums of rows, and every gradient; a row met twice by one token; idle rows."""
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=gen, dtype=dtype) for s in ((5, 6), (4, 3, 6)))
    ids = torch.tensor([[0, 1], [1, 1], [3, 0], [0, 3], [1, 0]])
    weights = torch.randn(5, 2, 3, generator=gen, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, w, weights)]
    for ours, plain in (
            (ops.row_products(x, ids, w), torch.einsum("td,tknd->tkn", x, w[ids])),
            (ops.sum_of_rows(weights, ids, w), torch.einsum("tkn,tknd->td", weights, w[ids]))):
        tolerance = dict(rtol=2e-2, atol=5e-2) if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(ours, plain, **tolerance)
        seed = torch.randn(ours.shape, generator=gen, dtype=dtype)
        for a, b in zip(*(torch.autograd.grad(y, leaves, seed, allow_unused=True)
                          for y in (ours, plain))):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **tolerance)
                assert a.shape != w.shape or not a[2].any()


# ---- 4. MoRE: layers tell shared experts who they are


def test_depth_embedding_is_added_before_the_router():
    model = build(flavour="unipool", n_experts=4, depth_embedding=True)
    layer, pool = model.expert_layers()[1]
    x = torch.randn(7, 16)
    plain = moe.MoE(layer.router)
    expected = plain(x + layer.depth.weight[0], pool)
    for a, b in zip(layer(x, pool)[:2], expected[:2]):
        torch.testing.assert_close(a, b)
    assert layer.depth.weight.any() and layer.depth.weight.shape == (1, 16)
    assert sum(".depth" in name for name, _ in model.named_parameters()) == 2


def test_random_router_never_changes_and_sees_no_gradient():
    model = build(flavour="hash", router="random", n_experts=4, top_k=2)
    layer, x = model.expert_layers()[0][0], torch.randn(50, 16, requires_grad=True)
    first = layer.router(x)
    assert not first.weights.requires_grad and (first.weights == 0.5).all()
    train(model, 3)
    assert torch.equal(layer.router(x).ids, first.ids)
    other = build(seed=9, flavour="hash", router="random", n_experts=4, top_k=2)
    assert torch.equal(other.expert_layers()[0][0].router(x).ids, first.ids)
    assert F.one_hot(first.ids, 4).sum((0, 1)).min() > 5


# ---- 5. A collapse is told once, with the layer's number; pools may specialise


def told(config, counts, steps=100, change=None, tokens=100.0):
    said = []
    with torch.device("meta"):
        watch = report.CollapseWatch(GPT(config), said.append)
    for step in range(steps):
        now = torch.tensor(counts if change is None or step % 50 else change, dtype=torch.float32)
        watch({"counts": now, "tokens": torch.tensor([tokens])})
    return said


def test_collapse_is_told_once_and_names_the_layer():
    config = small(flavour="switch", n_layer=2, n_experts=8)
    fine, crowded = [13, 13, 12, 12, 13, 12, 13, 12], [51, 7, 7, 7, 7, 7, 7, 7]
    assert told(config, [fine, fine], 300) == []
    said = told(config, [fine, crowded], 300)
    assert len(said) == 1 and "expert layer 1: expert 0" in said[0] and "--balance_coef" in said[0]
    assert "\n" not in said[0] and told(config, [fine, crowded], 99) == []
    assert told(config, [fine, crowded], 99 + 50, change=[fine, fine]) == []  # not in a row
    unused = told(config, [[50, 50, 0, 0, 0, 0, 0, 0], fine], 300)
    assert len(unused) == 1 and "expert layer 0: 75% of the experts" in unused[0]
    assert told(config, [[50, 50, 0, 0, 0, 0, 0, 0], fine], 100, change=[fine, fine]) == []


def test_layers_of_a_pool_may_specialise():
    """Each layer uses one expert alone, as in a locked pool of one each; together all are used."""
    config = small(flavour="unipool", n_layer=4, n_experts=4)
    assert told(config, (100 * torch.eye(4)).tolist(), 300) == []
    one = [[100, 0, 0, 0]] * 4
    assert "pool 0: expert 0" in told(config, one, 300)[0] and len(told(config, one, 300)) == 1
    few = small(flavour="topk", n_layer=1, n_experts=4, top_k=2)
    assert told(few, [[80, 60, 40, 20]], 300) == []  # 2 of 4: even routing gives each a half
    relu = small(flavour="remoe", n_layer=1, n_experts=8)
    assert told(relu, [[60] * 8], 300) == []  # before its L1 has grown


def test_advice_names_only_what_the_router_takes():
    words, = told(small(flavour="hash", n_layer=1, n_experts=8), [[90, 10] + [0] * 6], 100)
    assert "--balance" not in words and "--lr" in words


@pytest.mark.parametrize("flavour", ["dense", "infmoe", "switch"])
def test_a_run_watches_its_log(data, tmp_path, monkeypatch, capsys, flavour):
    monkeypatch.setattr(report.CollapseWatch.__init__, "__defaults__", (3,))
    collapsed = dict(n_experts=256, balance="none") if flavour == "switch" else {}
    tiny_run(data, tmp_path / "run", flavour, **collapsed, quiet=False)
    assert ("warning: expert layer 0: " in capsys.readouterr().out) == (flavour == "switch")
