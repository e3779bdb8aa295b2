"""lab/surgery.py: what pruning and moving do, against models made smaller by hand."""
import pytest
import torch
from moe_helpers import build
from probe_helpers import save_checkpoint, text_shards
from train_helpers import refused

import losses
import moe
from lab import surgery


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "norm", "relu"])
def test_without_is_a_router_of_fewer_rows(router):
    """Scores, gates and choices equal those after the rows are deleted; undo gives all back."""
    top_k, pruned = 2, torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    whole, small = moe.ROUTERS[router](8, 6, top_k), moe.ROUTERS[router](8, 4, top_k)
    whole.init_weights(1.0), small.init_weights(1.0)
    small.weight.data = whole.weight.data[~pruned]
    if router == "norm":
        small.c = whole.c
    x, before = torch.randn(9, 8), None
    before = whole(x)
    undo = surgery.without(whole, pruned)
    ours, theirs = whole(x), small(x)
    torch.testing.assert_close(ours.scores[:, ~pruned], theirs.scores)
    assert not ours.scores[:, pruned].any()
    if router != "relu":  # that one lists everybody, idle ones with gate 0
        same = ours.ids == (~pruned).nonzero().flatten()[theirs.ids]
        assert (same | (ours.weights == 0)).all()  # among zeros any
        torch.testing.assert_close(ours.weights, theirs.weights)
    undo()
    assert all(torch.equal(a, b) for a, b in zip(whole(x), before))


@pytest.mark.parametrize("overrides", [
    dict(flavour="topk", arch="llama", n_experts=4, n_layer=4),
    dict(flavour="unipool", n_experts=8), dict(flavour="remoe", n_experts=4),
    dict(flavour="deepseek", n_experts=4, arch="llama")], ids=lambda o: o["flavour"])
def test_table_of_a_checkpoint(overrides, tmp_path, monkeypatch, capsys):
    """Every row is there; the model is whole again after each operation; saliency is literal."""
    model = build(**overrides)
    save_checkpoint(model, tmp_path / "run", text_shards(tmp_path / "data"))
    config = surgery.SurgeryConfig(out_dir=str(tmp_path / "run"), tokens=256, prune=(0.5,),
                                   move=(0.25,))
    subject = surgery.load(config)
    rows = list(surgery.operate(subject, config))
    private = not model.config.pool_groups
    assert [r[0] for r in rows] == ["nothing"] + 3 * ["prune"] + 2 * private * ["move"]
    assert len({round(float(r[3]), 7) for r in rows}) > 2
    assert next(surgery.operate(subject, config))[3] == rows[0][3]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), subject.model.parameters()))
    used, saliency, uses = surgery.study(subject, config)
    seen = []
    layer, bank = subject.model.expert_layers()[0]
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out[1])))
    for batch in surgery.probe.batches(subject, config):
        subject.model(batch[:, :-1])
    literal = torch.zeros(model.config.n_experts)
    for x, routing in seen:
        for row, gates, ids in zip(x, routing.weights, routing.ids):
            for gate, e in zip(gates, ids):
                hidden = moe.activate(bank.w_in[e] @ row, bank.activation)
                literal[e] += (gate * (bank.w_out[e] @ hidden).norm()).detach()
    torch.testing.assert_close(saliency[0], literal, rtol=1e-4, atol=1e-4)
    idle = model.config.flavour == "remoe"  # it lists experts with gate 0, too
    working = torch.zeros(model.config.n_experts)
    for _, routing in seen:
        working += losses.expert_counts(
            routing.ids[(routing.weights > 0) | (not idle)], model.config.n_experts)
    assert used[0].tolist() == working.tolist() == uses[0].sum(0).tolist()
    monkeypatch.setattr("sys.argv", ["surgery", f"--out_dir={tmp_path / 'run'}", "--tokens=256"])
    surgery.main()
    assert "| prune | 25% | saliency |" in (tmp_path / "run/surgery.md").read_text()


def test_refusals(tmp_path, monkeypatch, capsys):
    save_checkpoint(build(flavour="hash", n_experts=4), tmp_path / "h", text_shards(tmp_path / "d"))
    assert "learned router" in refused(surgery.main, [f"--out_dir={tmp_path / 'h'}"], monkeypatch,
                                       capsys)
    assert "prune=" in refused(surgery.main, ["--prune=1.5,"], monkeypatch, capsys)
