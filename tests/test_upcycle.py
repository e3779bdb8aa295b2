"""A dense checkpoint becomes a model with experts: step 0, copies, noise, refusals."""
import pytest
import torch
from probe_helpers import hf_model, random_model, save_checkpoint, text_shards, tokens
from train_helpers import FLAVOURS, assert_refused, checkpoint

from model import GPT, ModelConfig
from support import upcycle

LLAMA = dict(arch="llama", bias=False)


def upcycled(dense, noise=0.0, **settings):
    """The model with experts that a dense one becomes, as train.py makes it."""
    config = ModelConfig(**(upcycle.backbone(vars(dense.config)) | settings))
    torch.manual_seed(1)
    model = GPT(config).eval()
    model.load_state_dict(upcycle.to_experts(dense.state_dict(), model, noise))
    return model


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [
    dict(flavour="topk"), dict(flavour="topk", n_experts=5, top_k=3, d_expert=80),
    dict(flavour="topk", moe_every=2), dict(flavour="topk", router="sigmoid", pool_groups=2),
    dict(flavour="deepseek"), dict(flavour="deepseek", n_shared_experts=2)],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_step_0_is_the_dense_model_where_gates_sum_to_1(arch, settings):
    dense, x = random_model(arch=arch, bias=False), tokens()
    model = upcycled(dense, **settings)
    assert model.config.flavour == settings["flavour"]
    torch.testing.assert_close(model(x).logits, dense(x).logits, rtol=1e-4, atol=1e-4)
    other = upcycled(dense, 0.5, **settings)(x).logits
    assert other.isfinite().all() and not torch.allclose(other, dense(x).logits, atol=1e-2)


@pytest.mark.parametrize("settings", [
    dict(flavour="switch"), dict(flavour="hash"), dict(flavour="unipool"),
    dict(flavour="infmoe"), dict(flavour="infmoe", infmoe_depth=2, pool_groups=1)],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_other_gates_scale_or_mask_the_copies(settings):
    """Not equal, and cannot be; but the experts are copies, each block's or pool's in order."""
    dense = random_model(**LLAMA, n_layer=4)
    model = upcycled(dense, **settings)
    assert model(tokens()).logits.isfinite().all()
    weights = dict(model.named_parameters())
    ffn = [dense.blocks[i].ffn.w_out.weight for i in range(4)]
    if settings["flavour"] == "unipool":  # 32 experts of one pool, 8 from each of its blocks
        for e in range(32):
            assert torch.equal(weights["pools.0.w_out"][e], ffn[e // 8])
    elif settings["flavour"] == "infmoe":  # twice as wide: two halves, which give half each
        name = "pools.0.w_out" if "pool_groups" in settings else "blocks.0.ffn.bank.w_out"
        assert torch.equal(weights[name], ffn[0].repeat(1, 2) / 2)
    else:
        assert all(torch.equal(e, ffn[3]) for e in weights["blocks.3.ffn.bank.w_out"])


def test_every_flavour_trains_on_from_a_dense_checkpoint(tmp_path, command):
    """The command as a user types it; biases of a GPT-2 are left out, and that is said."""
    data = text_shards(tmp_path / "data")
    for arch, bias in ("llama", False), ("gpt2", True):
        save_checkpoint(random_model(arch=arch, bias=bias), tmp_path / arch, data)
    common = dict(n_layer=2, n_head=4, d_model=32, d_ff=40, block_size=32, max_steps=1)
    bad = dict(common, flavour="peer", init_from=tmp_path / "llama", arch="llama")
    assert_refused(command(data, tmp_path / "peer", **bad), "expert=neuron")
    for flavour in FLAVOURS.keys() - {"dense", "peer"}:
        code, out, err = command(data, tmp_path / flavour, **common, flavour=flavour, lr=1e-9,
                                 init_from=tmp_path / "llama", arch="llama", upcycle_noise=0.01)
        assert code == 0 and "its FFNs copied into experts" in out, err
        assert checkpoint(tmp_path / flavour)["model_config"]["flavour"] == flavour
    code, out, _ = command(data, tmp_path / "x", **common, flavour="topk",
                           init_from=tmp_path / "gpt2")
    assert code == 0 and "their biases left out" in out
    bad = dict(common, flavour="topk", d_expert=50, init_from=tmp_path / "llama", arch="llama")
    assert_refused(command(data, tmp_path / "y", **bad), "d_expert=50", "d_ff=40")


def test_a_llama_of_transformers(tmp_path, command):
    """From its own folder, step 0: the validation loss is that of the dense start."""
    hf_model("llama").save_pretrained(tmp_path / "theirs")
    data, losses = text_shards(tmp_path / "data"), []
    for flavour in "dense", "topk":
        code, _, err = command(
            data, tmp_path / flavour, flavour, n_layer=2, n_head=4, d_model=32, d_ff=40,
            block_size=32, max_steps=1, lr=0, init_from=f"hf:{tmp_path / 'theirs'}", arch="llama")
        assert code == 0, err
        losses.append(checkpoint(tmp_path / flavour)["val_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
