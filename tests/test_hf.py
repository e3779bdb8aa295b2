"""hf.py against transformers itself: the same weights give the same logits, in both directions.

  1. in: logits   2. in: what is refused   3. out: logits, round trips   4. out: what is refused
  5. fine-tuning
"""
import base64
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from probe_helpers import (
    CONTEXT,
    VOCAB,
    hf_model,
    random_model,
    save_checkpoint,
    saved,
    text_shards,
    tokens,
)
from train_helpers import call, refused

from model import GPT
from support import folder, hf, weigh
from support.tokenizer import alike, get_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from safetensors.torch import load_file, save_file  # noqa: E402  (comes with transformers)


def rank_file(path):
    """A vocabulary with merges, one of them of merges, and a word that no merge reaches."""
    merged = [b"he", b"ll", b"hell", b"hello", b" w", "é".encode(), b"  ", b"zzq"]
    words = enumerate([bytes([i]) for i in range(256)] + merged)
    path.write_text("".join(f"{base64.b64encode(w).decode()} {rank}\n" for rank, w in words))
    return str(path)


def same_logits(mine, theirs):
    x = tokens()
    with torch.no_grad():
        expected = theirs(x).logits
        assert expected.std() > 0.5  # nothing vanishes
        torch.testing.assert_close(mine(x).logits, expected, atol=1e-4, rtol=1e-4)


# ---- 1. In.

@pytest.mark.parametrize("model_type, changes", [
    ("gpt2", {}),  # tied, biases everywhere
    ("gpt2", dict(tie_word_embeddings=False, n_inner=56, layer_norm_epsilon=1e-3)),
    ("llama", {}),  # grouped key/value heads, untied
    ("llama", dict(tie_word_embeddings=True, num_key_value_heads=4, rms_norm_eps=1e-3)),
    # wide heads
    ("llama", dict(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    ("mixtral", {}),
    # a window as long as the context changes nothing; K = E
    ("mixtral", dict(sliding_window=CONTEXT, num_experts_per_tok=6)),
    ("olmoe", {}),  # qk_norm over all heads, raw gates
    ("olmoe", dict(norm_topk_prob=True, num_experts_per_tok=3)),
    ("qwen3_moe", dict(norm_topk_prob=True)),  # qk_norm per head
    # every second block is dense
    ("qwen3_moe", dict(norm_topk_prob=False, num_hidden_layers=4, decoder_sparse_step=2)),
    ("qwen3_moe", dict(norm_topk_prob=False, num_experts_per_tok=1, tie_word_embeddings=True)),
])
def test_logits_equal_transformers(model_type, changes, tmp_path):
    theirs = hf_model(model_type, **changes)
    mine = GPT.from_hf(saved(theirs, tmp_path))
    same_logits(mine, theirs)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (mine, theirs)]
    assert sizes == [mine.config.n_params()] * 2
    assert mine.config.block_size == CONTEXT and mine.config.vocab_size == VOCAB
    assert all(p.requires_grad and p.dtype == torch.float32 for p in mine.parameters())


def test_half_precision_files_become_float32(tmp_path):
    folder = saved(hf_model("mixtral").bfloat16(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same_logits(GPT.from_hf(folder), theirs.eval())


# ---- 2. In: what would compute something else here is refused by name.

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("model_type, changes, words", [
    ("llama", dict(rope_parameters=LINEAR), "rope_type=linear"),
    ("llama", dict(attention_bias=True), "attention_bias"),
    ("llama", dict(mlp_bias=True), "mlp_bias"),
    ("llama", dict(hidden_act="gelu"), "hidden_act=gelu"),
    ("mixtral", dict(sliding_window=CONTEXT - 1), f"sliding_window={CONTEXT - 1}"),
    ("olmoe", dict(clip_qkv=8.0), "clip_qkv"),
    ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers"),
    ("qwen3_moe", dict(use_sliding_window=True, sliding_window=8), "sliding_window=8"),
    ("gpt2", dict(activation_function="relu"), "activation_function=relu"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("qwen2_moe", {}, "model type qwen2_moe"),
])
def test_other_architectures_are_refused(model_type, changes, words, tmp_path):
    folder = saved(hf_model(model_type, **changes), tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        GPT.from_hf(folder)
    assert "gpt2, llama, mixtral, olmoe, qwen3_moe" in str(error.value)
    assert "\n" not in str(error.value)


def change_weights(folder, change):
    """Rewrite the folder's weights as change({name: tensor}) returns them."""
    path = Path(folder, "model.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def drop(part):
    return lambda weights: {name: w for name, w in weights.items() if part not in name}


@pytest.mark.parametrize("model_type, change, words", [
    ("llama", drop("layers.1.mlp.up_proj"), "1 missing, such as model.layers.1.mlp.up_proj.weight"),
    ("gpt2", drop("ln_f"), r"2 missing, such as transformer.ln_f.bias"),
    ("olmoe", drop("layers.0.mlp.gate.weight"),
     "1 missing, such as model.layers.0.mlp.gate.weight"),
    # one expert of six
    ("olmoe", drop("0.mlp.experts.3.up_proj"),
     "1 missing, such as model.layers.0.mlp.experts.gate_up_proj"),
    ("olmoe", drop("experts.3.down_proj"), "model.layers.0.mlp.experts.down_proj"),
    ("llama", lambda w: w | {"model.layers.7.x": torch.zeros(2)},
     "1 unexpected, such as model.layers.7.x"),
    ("llama", lambda w: w | {"model.norm.weight": torch.zeros(2)},
     "1 of another shape, such as model.norm.weight"),
])
def test_incomplete_folders_are_refused_by_name(model_type, change, words, tmp_path, capfd):
    folder = saved(hf_model(model_type), tmp_path)
    change_weights(folder, change)
    for load in (GPT.from_hf, hf.load_theirs):
        with pytest.raises(ValueError, match=words) as error:
            load(folder)
        assert "\n" not in str(error.value) and folder in str(error.value)
    assert "REPORT" not in capfd.readouterr().err


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no model that transformers can read"):
        GPT.from_hf(str(tmp_path))
    path = Path(saved(hf_model("llama"), tmp_path), "model.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="no model that transformers can read"):
        GPT.from_hf(str(tmp_path))


@pytest.mark.parametrize("script", ["train.py --init_from=hf:{} --out_dir={}/out",
                                    "probe.py --hf={} --save_dir={}/out --routing"])
def test_code_in_a_folder_never_runs(script, tmp_path):
    """Not even where somebody, or a pipe, answers "y" to transformers' question."""
    folder = tmp_path / "theirs"
    saved(hf_model("mixtral"), folder)
    settings = json.loads((folder / "config.json").read_text())
    theirs = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    settings |= {"model_type": "mine", "auto_map": theirs}
    (folder / "config.json").write_text(json.dumps(settings))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (folder / "mine.py").write_text(code)
    data = text_shards(tmp_path / "data", 2_000, 2_000)
    command = [sys.executable, *script.format(folder, tmp_path).split(), f"--dataset={data}"]
    done = subprocess.run(command, input="y\n" * 5, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "ran").exists()


def test_transformers_that_is_missing_or_old(monkeypatch):
    install = r': pip install -e "\.\[hf\]"'
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"4\.57\.1 is too old" + install):
        GPT.from_hf("gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers is not installed" + install):
        GPT.from_hf("gpt2")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    model = hf_model("olmoe")
    model.model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in 1 weights, model\.norm"):
        GPT.from_hf(saved(model, tmp_path))


def test_the_tokenizer_of_a_folder(tmp_path):
    """By what it does to a text, not by its name; without one, by the size of the vocabulary."""
    reads = lambda name, spec, n: folder.same_as_hugging_face(str(name), {
        "tokenizer": spec, "vocab_size": get_tokenizer(spec).vocab_size}, n)
    spec = rank_file(tmp_path / "x.tiktoken")
    for mine, other in (("bytes", spec), (spec, "bytes")):
        tokenizer, path = get_tokenizer(mine), tmp_path / Path(mine).stem
        hf.export(random_model(vocab_size=tokenizer.vocab_size), path, tokenizer)
        assert reads(path, mine, 10**6) and not reads(path, other, 1)
        again = get_tokenizer(f"hf:{path}")  # and out again, as it came
        hf.export(random_model(vocab_size=again.vocab_size), tmp_path / "again", again)
        assert alike(get_tokenizer(f"hf:{tmp_path / 'again'}"), tokenizer)
    for model_type in ("olmoe", "mixtral"):
        assert reads(saved(hf_model(model_type), tmp_path / model_type), "bytes", 257)
        large = saved(hf_model(model_type, vocab_size=2000), tmp_path / f"{model_type}2")
        assert not reads(large, "bytes", 2000)


# ---- 3. Out.

TOPK = dict(arch="llama", flavour="topk", n_experts=6, d_expert=24, n_kv_head=2)


@pytest.mark.parametrize("settings, architecture", [
    (dict(arch="gpt2"), "GPT2LMHeadModel"),  # tied
    (dict(arch="gpt2", tie_embeddings=False), "GPT2LMHeadModel"),
    (dict(arch="llama", n_kv_head=2, head_dim=16, rope_base=1e6), "LlamaForCausalLM"),
    (dict(arch="llama", tie_embeddings=True), "LlamaForCausalLM"),
    (TOPK, "MixtralForCausalLM"),
    (TOPK | dict(head_dim=16, top_k=3), "MixtralForCausalLM"),
    (TOPK | dict(qk_norm="full", norm_topk_prob=False), "OlmoeForCausalLM"),
    (TOPK | dict(qk_norm="head", norm_topk_prob=False, moe_every=2, head_dim=16),
     "Qwen3MoeForCausalLM"),
    (TOPK | dict(flavour="switch", qk_norm="head"), "Qwen3MoeForCausalLM"),  # top 1, raw gates
])
def test_export_loads_in_transformers_and_comes_back(settings, architecture, tmp_path):
    model = random_model(**settings)
    hf.export(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == architecture and list(tmp_path.glob("*.safetensors"))
    same_logits(model, theirs)
    again, x = GPT.from_hf(str(tmp_path)), tokens()
    mine, back = model.state_dict(), again.state_dict()
    assert mine.keys() == back.keys() and all(torch.equal(mine[name], back[name]) for name in mine)
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("spec", ["bytes", "ranks"])
def test_export_of_the_tokenizer(spec, tmp_path):
    tokenizer = get_tokenizer(rank_file(tmp_path / "x.tiktoken") if spec == "ranks" else spec)
    hf.export(random_model(vocab_size=tokenizer.vocab_size), tmp_path / "x", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    text = "zzq hello  whello, é ∞ 'll\n\n\tend "
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eot and len(theirs) == tokenizer.vocab_size


# ---- 4. Out: what no architecture there computes.

@pytest.mark.parametrize("settings, words", [
    (dict(flavour="infmoe"), "flavour=infmoe"),
    (dict(flavour="unipool", arch="llama", n_experts=6), "pool_groups=1"),
    (dict(flavour="topk", n_experts=6), "arch=gpt2"),
    (TOPK | dict(norm_topk_prob=False), "norm_topk_prob=False"),
    (TOPK | dict(router="sigmoid"), "router=sigmoid"),
    (TOPK | dict(n_shared_experts=1), "n_shared_experts=1"),
    (TOPK | dict(balance="bias"), "balance=bias"),
    (TOPK | dict(moe_every=2), "moe_every=2"),
    (TOPK | dict(qk_norm="full", head_dim=16), "head_dim=16"),
    (dict(arch="llama", qk_norm="head"), "qk_norm=head"),
    (dict(arch="llama", bias=True), "bias=True"),
    (dict(arch="llama", activation="gelu"), "activation=gelu"),
    (dict(arch="gpt2", activation="swiglu"), "activation=swiglu"),
    (dict(arch="gpt2", bias=False), "bias=False"),
])
def test_export_refuses_with_the_reason(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        hf.export(random_model(**settings), tmp_path / "x")
    assert "can be exported" in str(error.value) and not (tmp_path / "x").exists()


def test_command_line(tmp_path, capsys, monkeypatch):
    """python model.py: counts of a config or a checkpoint, its export, mistakes in one line."""
    command = functools.partial(weigh.main, sys.modules[GPT.__module__].__doc__)
    trained = random_model(**TOPK)
    save_checkpoint(trained, tmp_path, "data/stdlib")
    target = tmp_path / "theirs"
    words = [f"--out_dir={tmp_path}", f"--export={target}"]
    printed = call(command, words, monkeypatch, capsys)[1]
    assert f"{trained.config.n_params():,}" in printed
    assert f"{trained.config.n_active_params():,}" in printed
    same_logits(trained, transformers.AutoModelForCausalLM.from_pretrained(target).eval())
    assert transformers.AutoTokenizer.from_pretrained(target).eos_token_id == 256
    printed = call(command, ["config/unipool_182m.py"], monkeypatch, capsys)[1]
    assert "777,898,764" in printed
    for argv, words in (("", "--out_dir"), (f"--out_dir={tmp_path}/no", "no checkpoint")):
        said = refused(command, ["--export=x", *argv.split()], monkeypatch, capsys)
        assert words in said


def test_export_leaves_a_checkpoint_alone(tmp_path):
    folder = save_checkpoint(random_model(**TOPK), tmp_path / "x", "data/stdlib")
    (tmp_path / "x" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    for target in (folder, str(tmp_path / "link"), f"{folder}/../x"):
        with pytest.raises(ValueError, match="holds a checkpoint"):
            hf.export(random_model(**TOPK), target)
    assert (tmp_path / "x" / "config.json").read_text() == "{}"
    assert len(list((tmp_path / "x").iterdir())) == 2


# ---- 5. Fine-tuning from them, with the losses of the third paper.

def test_fine_tuning_step(tmp_path, monkeypatch, capsys):
    import train
    folder = saved(hf_model("olmoe"), tmp_path / "hf")
    data = text_shards(tmp_path / "data", 20_000, 2_000)
    words = [
        f"--init_from=hf:{folder}", f"--dataset={data}", f"--out_dir={tmp_path}/out",
        "--max_steps=2", "--batch_tokens=256", "--micro_batch=4", "--eval_tokens=256", "--lr=1e-3",
        "--specialization_coef=2e-3", "--coupling_coef=1e-3", "--device=cpu", "--dtype=float32"]
    assert call(train.main, words, monkeypatch, capsys)[0] == 0
    before, after = GPT.from_hf(folder), GPT.from_checkpoint(tmp_path / "out")
    assert after.config.specialization_coef == 2e-3 and after.config.qk_norm == "full"
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    # a step, not a fresh start
    assert max((a - b).abs().max() for a, b in zip(before.parameters(), after.parameters())) < 0.02
