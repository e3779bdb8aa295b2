"""What breaks mixture-of-experts code elsewhere, for every flavour: a family of each by default,
every cell of the table of what composes with what as slow tests.

  1. idle experts         4. saved state             7. generation with the cache
  2. auxiliary losses     5. accumulation, ranks     8. real data, loss falling
  3. causality            6. compile, host sync      9. bfloat16     10. on a GPU
"""
import dataclasses
import itertools
import random

import pytest
import torch
from moe_helpers import (
    CELLS,
    FAMILIES,
    build,
    gradients,
    random_tokens,
    real_text,
    small,
    train,
    training_loss,
)
from torch._subclasses import fake_tensor

import losses
import moe
from model import GPT
from support import auxiliary


def flavours(condition=lambda config: True, **more):
    """Over the families (and `more`) and, slow, over all cells that the condition fits."""
    cells = [pytest.param(c, id=name) for name, c in {**FAMILIES, **more}.items()]
    cells += [pytest.param(c, id=name, marks=pytest.mark.slow) for name, c in CELLS.items()]
    cells = [cell for cell in cells if condition(small(**cell.values[0]))]
    return pytest.mark.parametrize("overrides", cells)


def is_discrete(config):
    return config.flavour not in ("dense", "infmoe")


def stacked(bank, n_experts):
    """The weights of a bank that belong to single experts: their first dimension counts experts."""
    weights = [p for p in bank.parameters() if len(p) == n_experts]
    assert weights
    return weights


def moe_of(model):
    """The layers with experts, each with the bank that does its work."""
    layers = [b.ffn for b in model.blocks if isinstance(b.ffn, moe.MoE)]
    return [(layer, layer.bank or model.pool_of(i)) for i, layer in enumerate(layers)]


def losses_of(model, tokens):
    return model.train()(tokens, tokens, return_routings=True)


def finite_gradients(model, tokens, targets=None, **inputs):
    """The loss and its gradients: all finite, none missing (that would stall DDP)."""
    loss, grads = gradients(model, tokens, tokens if targets is None else targets, **inputs)
    assert loss.isfinite() and all(g is not None and g.isfinite().all() for g in grads.values())
    return loss, grads


@pytest.fixture
def poisoned():
    """Uninitialised memory reads as NaN: from torch.empty, and in the allocators' free blocks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = [torch.full((2**(k // 4),), float("nan"), device=device) for k in range(16, 80)]
    del blocks
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# ---- 1. Idle experts: exact zeros in their gradients, no NaN, no missing gradient.

def send_everybody_to(model, ids):
    """Every token to the same experts."""
    for layer, _ in moe_of(model):
        def forward(x, *args, original=layer.router.forward):
            r = original(x, *args)
            chosen = torch.tensor(ids).expand(len(x), -1)
            gates = 1 + r.weights[:, :len(ids)]  # never 0, and the router has a gradient
            return moe.Routing(gates, chosen, r.scores, r.logits)
        layer.router.forward = forward


@flavours(is_discrete)
@pytest.mark.parametrize("batch, length", [(2, 16), (1, 1)], ids=["T=32", "T=1"])
def test_all_tokens_on_the_same_experts(overrides, batch, length, poisoned):
    model, tokens = build(**overrides), random_tokens(batch, length)
    busy = list(range(1, 1 + model.config.top_k))
    idle = [e for e in range(model.config.n_experts) if e not in busy]
    send_everybody_to(model, busy)
    finite_gradients(model, tokens)
    for _, bank in moe_of(model):
        for weight in stacked(bank, model.config.n_experts):
            assert not weight.grad[idle].any()
            assert weight.grad[busy].flatten(1).any(1).all()
    for counts in losses_of(model, tokens).stats["counts"]:
        assert counts[busy].tolist() == [batch * length] * len(busy) and not counts[idle].any()


@flavours(lambda config: config.flavour == "infmoe" and config.infmoe_mask == "post"
          and config.rates()[-1] is not None)
@pytest.mark.parametrize("length", [16, 1])
def test_neurons_that_no_token_keeps_have_zero_gradients(overrides, length, poisoned):
    model, tokens = build(**overrides), random_tokens(1, length)
    finite_gradients(model, tokens)
    if model.config.pool_groups == 0:
        for (_, bank), codes in zip(moe_of(model), losses_of(model, tokens).routings):
            unused = (bank.masks(codes)[-1] == 0).all(0).all(0)  # (F,)
            assert not bank.w_out.grad[:, unused].any()
            assert length > 1 or unused.any()


# ---- 2. Auxiliary losses.

def literal_balance(model, routings):
    """coef * the sum over layers (or pools) of M * sum_i fbar_i Pbar_i."""
    c, total = model.config, 0
    groups = [[r] for r in routings]
    if c.balance == "pool":
        size = len(routings) // c.pool_groups
        groups = [routings[g * size:(g + 1) * size] for g in range(c.pool_groups)]
    for group in groups:
        scores = [r.scores / r.scores.sum(-1, keepdim=True) if c.balance_scores == "normalised"
                  else r.scores for r in group]
        for i in range(c.n_experts):
            working = [r.ids[r.weights > 0] if c.router == "relu" else r.ids for r in group]
            f = sum((ids == i).double().mean().item() for ids in working) / len(group)
            p = sum(s[:, i].mean() for s in scores) / len(group)
            total = total + c.n_experts * f * p
    return c.balance_coef * total


@flavours(lambda config: is_discrete(config) and config.balance in ("layer", "pool"),
          sigmoid=dict(flavour="deepseek", balance="layer", n_experts=4),  # normalised scores
          pools=dict(flavour="unipool", n_layer=4, pool_groups=2, n_experts=6, top_k=2))
def test_balance_loss_of_the_model_is_the_papers(overrides):
    model, tokens = build(**overrides), random_tokens(2, 16)
    output = losses_of(model, tokens)
    expected = literal_balance(model, output.routings)
    assert output.aux["balance"].item() == pytest.approx(expected.item(), rel=1e-4)
    routers = [layer.router.weight for layer, _ in moe_of(model)]
    ours, literal = (torch.autograd.grad(loss, routers, retain_graph=True)
                     for loss in (output.aux["balance"], expected))
    for a, b in zip(ours, literal):
        assert a.any() and torch.allclose(a, b, atol=1e-5)


@flavours(lambda config: config.flavour == "infmoe" and config.balance == "layer")
def test_balance_loss_of_infmoe_is_the_sum_over_masks(overrides):
    model, tokens = build(**overrides), random_tokens(2, 16)
    output, total = losses_of(model, tokens), 0
    for (_, bank), codes in zip(moe_of(model), output.routings):
        scores, mask = bank.mask_scores(codes)[0], bank.masks(codes)[0]
        q = (mask != 0).double().mean((0, 1))
        total = total + scores.shape[-1] * (q / q.sum() * scores.softmax(-1).mean((0, 1))).sum()
    expected = model.config.balance_coef * total.item()
    assert output.aux["balance"].item() == pytest.approx(expected, rel=1e-5)


@flavours(lambda config: config.flavour != "dense")
def test_coefficients_scale_their_loss_and_nothing_else(overrides):
    """Twice the coefficient, twice that loss; 0 leaves it out; the cross-entropy never moves."""
    config, tokens = small(**overrides), random_tokens(2, 16)
    output = losses_of(build(**overrides), tokens)
    names = [f.name[:-5] for f in dataclasses.fields(config) if f.name.endswith("_coef")]
    expected = {name for name in names if getattr(config, f"{name}_coef")}
    if config.balance == "bias":  # its coefficient is a rate, not a loss
        expected.remove("balance")
    assert set(output.aux) == expected
    for name, factor in itertools.product(expected, (2, 0)):
        changed = {f"{name}_coef": factor * getattr(config, f"{name}_coef")}
        if not factor and name == "coupling":
            changed["coupling"] = "mass"
        other = losses_of(build(**{**overrides, **changed}), tokens)
        assert set(other.aux) == (expected if factor else expected - {name})
        # rounding apart: without the specialization loss infmoe sums its samples elsewhere
        torch.testing.assert_close(other.loss, output.loss, rtol=1e-6, atol=0)
        for key, value in other.aux.items():
            if key == name:
                assert value.item() / output.aux[key].item() == pytest.approx(factor)
            else:
                torch.testing.assert_close(value, output.aux[key], rtol=1e-6, atol=0)


def moves(loss, parameters):
    grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    return any(g is not None and g.any() for g in grads)


@flavours(lambda config: config.flavour != "dense")
def test_each_loss_moves_whom_it_should(overrides):
    """Every router, by specialization every bank; balance and z no private expert at the end."""
    model, tokens = build(**overrides), random_tokens(2, 16)
    output = losses_of(model, tokens)
    for name, loss in output.aux.items():
        for layer, bank in moe_of(model):
            assert moves(loss, bank.parameters() if name == "specialization"
                         else layer.router.parameters()), name
        last = moe_of(model)[-1][1]  # no later router sees its output
        if name in ("balance", "z") and not model.pools:
            assert not moves(loss, [p for n, p in last.named_parameters() if "w_z" not in n]), name


@flavours(lambda config: config.coupling_coef > 0 and config.expert == "ffn")
def test_coupling_and_specialization_of_the_model(overrides):
    """Means over pairs of adjacent layers, and over layers: lambda does not grow with depth."""
    model, tokens = build(**overrides), random_tokens(2, 16)
    if model.paths is not None:
        torch.nn.init.uniform_(model.paths)
    output = losses_of(model, tokens)
    r, c = output.routings, model.config
    pairs = [moe.coupling_loss(a.scores, a.ids, b.scores, b.ids,
                               None if model.paths is None else model.paths[i])
             for i, (a, b) in enumerate(zip(r, r[1:]))]
    assert len(pairs) == len(r) - 1
    expected = c.coupling_coef * sum(pairs).item() / len(pairs)
    assert output.aux["coupling"].item() == pytest.approx(expected, rel=1e-5)
    inputs, terms = {}, []
    for i, (layer, _) in enumerate(moe_of(model)):
        layer.register_forward_pre_hook(lambda module, args, i=i: inputs.__setitem__(i, args[0]))
    model(tokens, tokens)
    for i, (_, bank) in enumerate(moe_of(model)):
        acts = torch.stack([torch.stack([moe.activate(bank.w_in[e] @ x, bank.activation)
                                         for e in ids.tolist()])
                            for x, ids in zip(inputs[i], r[i].ids)])
        terms.append(moe.specialization_loss(acts))
    expected = c.specialization_coef * sum(terms).item() / len(terms)
    assert output.aux["specialization"].item() == pytest.approx(expected, rel=1e-4)


# ---- 3. Causality: nothing that comes later is seen.

@flavours()
def test_the_future_and_other_sequences_are_not_seen(overrides):
    """In evaluation neither its neighbours in the batch nor what follows change a token's logits;
    what came before does."""
    model, tokens, keys = build(**overrides).double().eval(), random_tokens(3, 16), torch.arange(3)
    with torch.no_grad():
        together = model(tokens, noise_key=keys).logits
        for t in (0, 8, 15):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 257
            logits = model(changed, noise_key=keys).logits
            assert torch.allclose(logits[:, :t], together[:, :t], atol=1e-9)
            assert not torch.allclose(logits[:, t], together[:, t], atol=1e-3)
            assert not torch.allclose(logits[:, 15], together[:, 15], atol=1e-9)
        alone = torch.cat([model(tokens[i:i + 1, :9], noise_key=keys[i:i + 1]).logits
                           for i in range(3)])
    assert torch.allclose(together[:, :9], alone, atol=1e-9)


# ---- 4. All state is in the state dict: loading in the middle changes no bit of what follows.

@flavours()
def test_steps_after_loading_equal_steps_without(overrides, tmp_path):
    def trainer(seed):
        model = build(seed=seed, **overrides)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def steps(first, last):
            for step in range(first, last):
                tokens, targets = real_text(2, 16, seed=step)
                output = model.train()(tokens, targets, noise_key=torch.tensor([step, step + 1]))
                optimizer.zero_grad()
                training_loss(output).backward()
                optimizer.step()
                model.update_balance(output.stats, step + 1)
        return steps, model, optimizer
    steps, whole, _ = trainer(0)
    steps(0, 4)
    steps, *first = trainer(0)
    steps(0, 2)
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    steps, *second = trainer(1)
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    steps(2, 4)
    for (name, a), b in zip(whole.state_dict().items(), second[0].state_dict().values()):
        assert torch.equal(a, b), name


# ---- 5. Accumulation and ranks.

WITHOUT_BALANCE = dict(balance="none", balance_coef=None, balance_scores=None)


def mean_gradients(model, parts):
    """Mean loss and gradients over equally large micro-batches (tokens, targets, keys)."""
    results = [gradients(model, tokens, targets, noise_key=keys) for tokens, targets, keys in parts]
    loss = sum(r[0] for r in results) / len(results)
    return loss, {name: sum(r[1][name] for r in results) / len(results) for name in results[0][1]}


def assert_close(a, b, atol=1e-6):
    assert torch.allclose(a[0], b[0], atol=atol)
    for name in a[1]:
        assert torch.allclose(a[1][name], b[1][name], atol=atol, rtol=1e-3), name


@flavours()
def test_micro_batches_equal_one_big_batch(overrides):
    """All losses but balance are means over tokens: z, specialization, coupling included."""
    if small(**overrides).balance in losses.BALANCES:
        overrides = {**overrides, **WITHOUT_BALANCE}
    if small(**overrides).lock_coef:
        overrides = {**overrides, "lock_coef": 0.0}
    model, batch = build(**overrides).double(), (*real_text(4, 16), torch.arange(4))
    whole = mean_gradients(model, [batch])
    for n in (2, 4):
        assert_close(whole, mean_gradients(model, zip(*(part.chunk(n) for part in batch))))


@flavours(lambda config: config.balance in losses.BALANCES and config.balance_coef > 0)
def test_balance_losses_of_micro_batches_differ_and_how(overrides, monkeypatch):
    """f is of one micro-batch (over all ranks): each balances itself, which is stricter. With f of
    the whole in every part, as ranks have it, the mean of the parts is the whole."""
    model = build(**{**overrides, "balance_coef": 0.5}).double()
    batch, counted = (*real_text(4, 16), torch.arange(4)), []
    whole, parts = mean_gradients(model, [batch]), list(zip(*(part.chunk(2) for part in batch)))
    monkeypatch.setattr(auxiliary, "sum_over_ranks", lambda x: counted.append(x) or x)
    accumulated = mean_gradients(model, parts)
    monkeypatch.setattr(auxiliary, "sum_over_ranks",
                        lambda x: sum(part for part in counted if part.shape == x.shape))
    assert_close(whole, mean_gradients(model, parts))
    assert (accumulated[0] - whole[0]).abs() > 1e-6


@flavours()
def test_update_balance_from_summed_statistics_equals_one_big_batch(overrides):
    """Sums over micro-batches are the whole's statistics; forward passes move no state."""
    tokens, keys, states, sums = random_tokens(4, 16), torch.arange(4), [], []
    for n in (1, 2, 4):
        model = build(**overrides).train()
        stats = [model(t, t, noise_key=k).stats for t, k in zip(tokens.chunk(n), keys.chunk(n))]
        sums.append({name: sum(s[name] for s in stats) for name in stats[0]})
        model.update_balance(sums[-1])
        states.append(dict(model.named_buffers()))
    assert bool(sums[0]) == (model.config.flavour != "dense")
    for name, whole in sums[0].items():
        assert all(torch.allclose(s[name], whole, rtol=1e-4, atol=1e-3) for s in sums), name
        assert not whole.requires_grad
    for name in states[0]:
        assert all(torch.allclose(s[name], states[0][name], atol=1e-6) for s in states), name
    assert auxiliary.log_columns(model.config, {}) == {}


# ---- 6. torch.compile without graph breaks, and no waiting for the host.

@flavours()
def test_compiled_equals_eager(overrides):
    """fullgraph: loss, auxiliary losses, statistics and every gradient."""
    torch._dynamo.reset()
    model, (tokens, targets) = build(**overrides), real_text(2, 16)
    keys = torch.tensor([3, 4 << 33])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model.train()(tokens, targets, noise_key=keys)
    output = compiled(tokens, targets, noise_key=keys)
    assert torch.allclose(output.loss, expected.loss, atol=1e-6)
    for ours, theirs in ((output.aux, expected.aux), (output.stats, expected.stats)):
        assert list(ours) == list(theirs)
        for name in ours:
            assert torch.allclose(ours[name], theirs[name], atol=1e-5, rtol=1e-4), name
    grads = []
    for out in (output, expected):
        model.zero_grad()
        training_loss(out).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for (name, _), a, b in zip(model.named_parameters(), *grads):
        assert torch.allclose(a, b, atol=1e-5), name
    torch._dynamo.reset()


@flavours()
@pytest.mark.parametrize("training", [True, False])
def test_hot_path_needs_no_value_on_the_host(overrides, training):
    """With shapes and no values: whoever asks for one (item, bool, nonzero) raises."""
    with fake_tensor.FakeTensorMode():
        model = build(**overrides).train(training)
        tokens = random_tokens(2, 16)
        output = model(tokens, tokens, noise_key=torch.zeros(2, dtype=torch.int64))
        if training:
            training_loss(output).backward()
            model.update_balance(output.stats)
            assert all(p.grad.shape == p.shape for p in model.parameters())


def test_the_search_for_host_reads_can_fail():
    with fake_tensor.FakeTensorMode():
        model, tokens = build(flavour="topk", backend="loop").train(), random_tokens(1, 4)
        # the oracle is exempt: it asks which tokens chose an expert
        with pytest.raises(fake_tensor.DynamicOutputShapeException):
            model(tokens)
        stats = build(flavour="topk").train()(tokens, tokens).stats
        with pytest.raises(fake_tensor.DataDependentOutputException):
            auxiliary.log_columns(model.config, stats)


# ---- 7. Generation with the KV cache is generation without it, past block_size too.

@flavours()
def test_cached_generation_equals_uncached(overrides):
    """Every step's logits, for a prompt that slides twice; sampled tokens under one seed."""
    model, tokens = build(**overrides).double().eval(), random_tokens(2, 5)
    seen = {True: [], False: []}
    for use_cache, logits in seen.items():
        hook = model.head.register_forward_hook(
            lambda module, args, out, logits=logits: logits.append(out[:, -1]))
        generated = list(model.generate(tokens, 30, temperature=0.8, top_k=50,
                                        generator=torch.Generator().manual_seed(0),
                                        use_cache=use_cache))
        hook.remove()
        seen[use_cache] = torch.stack(logits), torch.cat(generated, dim=1)
    assert torch.allclose(seen[True][0], seen[False][0], atol=1e-9)
    assert torch.equal(seen[True][1], seen[False][1])
    assert seen[True][1].unique().numel() > 5


# ---- 8. Real data: the interpreter's own library, as bytes.

def assert_learns(overrides, steps):
    """By more than a nat from log 257; all of it finite; every parameter moves."""
    config = dict(overrides, d_model=32, d_ff=64, block_size=32, n_head=4)
    model = build(std=0.05, **config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fell = train(model, steps)
    assert all(torch.tensor(fell).isfinite()) and sum(fell[-4:]) / 4 < fell[0] - 1, fell
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name
    evaluation = model.eval()(*real_text(4, 32, seed=10_000)).loss
    assert evaluation.isfinite() and evaluation < fell[0] - 0.7


@pytest.mark.parametrize("name", FAMILIES)
def test_families_learn_real_text(name):
    assert_learns(FAMILIES[name], 30)


DRAWN = random.Random(3).sample(sorted(CELLS), 6)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in DRAWN)) for name in CELLS])
def test_cells_learn_real_text(name):
    assert_learns(CELLS[name], 25 if name in DRAWN else 40)


@pytest.mark.parametrize("name", CELLS)
def test_cells_train_a_step(name):
    """And a resolved configuration, as checkpoints hold it, builds itself again."""
    model = build(**CELLS[name])
    finite_gradients(model, *real_text(2, 16), noise_key=torch.tensor([1, 2]))
    assert dataclasses.replace(model.config) == model.config


# ---- 9. bfloat16: autocast as train.py uses it, and weights in bfloat16.

@flavours()
@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_bfloat16(overrides):
    """Autocast: loss within 0.05 nats, gradients within 50 % in norm (routing may flip)."""
    model, (tokens, targets) = build(std=0.05, **overrides), real_text(2, 16)
    keys = torch.tensor([1, 2])
    loss, expected = gradients(model, tokens, targets, noise_key=keys)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, targets, noise_key=keys)
    total = training_loss(output)
    assert output.loss.dtype == torch.float32 and (total - loss).abs() < 0.05
    model.zero_grad()
    total.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
        assert (p.grad - expected[name]).norm() < 0.5 * expected[name].norm() + 1e-5, name
    with torch.autocast("cpu", torch.bfloat16):
        assert len(list(model.eval().generate(tokens[:, :3], 20))) == 20
    model.bfloat16()
    assert len(list(model.generate(tokens[:, :3], 20))) == 20
    assert model(tokens, targets).loss.isfinite()


# ---- 10. On a GPU: the same numbers as on the CPU, and the driver itself watches for host syncs.

@pytest.mark.gpu
@flavours()
def test_gpu_equals_cpu(overrides, poisoned):
    model, (tokens, targets), keys = build(**overrides), real_text(2, 16), torch.tensor([1, 2])
    expected = gradients(model, tokens, targets, noise_key=keys)
    on_gpu = GPT(model.config)
    on_gpu.load_state_dict(model.state_dict())
    on_gpu.cuda()
    loss, grads = gradients(on_gpu, tokens.cuda(), targets.cuda(), noise_key=keys.cuda())
    assert torch.allclose(loss.cpu(), expected[0], atol=1e-4)
    for name, grad in grads.items():
        assert torch.allclose(grad.cpu(), expected[1][name], atol=1e-3, rtol=1e-2), name


@pytest.mark.gpu
@flavours()
def test_gpu_never_waits_for_the_host(overrides):
    model = build(**overrides).cuda().train()
    tokens, keys = random_tokens(2, 16).cuda(), torch.tensor([1, 2]).cuda()
    for mode in ("default", "error"):  # the first pass compiles kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                output = model(tokens, tokens, noise_key=keys)
            training_loss(output).backward()
            model.update_balance(output.stats)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters())
