"""Hugging Face in and out: transformers' checkpoints as a GPT, and a GPT as a folder that AutoModelForCausalLM loads.

    model = GPT.from_hf("allenai/OLMoE-1B-7B-0924")                  # gpt2, llama, mixtral, olmoe, qwen3_moe
    python model.py --out_dir=out/x --export=DIR                     # dense GPT-2 and LLaMA; topk experts as Mixtral,
                                                                     # as OLMoE (qk_norm=full) or Qwen3-MoE (qk_norm=head)
    python train.py --init_from=hf:allenai/OLMoE-1B-7B-0924 --dataset=...

One table of names per family serves both directions. What would not give the same logits is refused, with the reason.
"""
import contextlib
import logging
import re
from pathlib import Path

import torch

from model import GPT, ModelConfig
from support.tokenizer import get_tokenizer

FAMILIES = ("gpt2", "llama", "mixtral", "olmoe", "qwen3_moe")
MOE_FAMILIES = {"none": "mixtral", "full": "olmoe", "head": "qwen3_moe"}  # by qk_norm

# Ours <- theirs; several of theirs are stacked along the first dimension.
LLAMA = {
    "wte.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
    "blocks.{}.norm1.weight": ["model.layers.{}.input_layernorm.weight"],
    "blocks.{}.norm2.weight": ["model.layers.{}.post_attention_layernorm.weight"],
    "blocks.{}.attention.qkv.weight": [f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"],
    "blocks.{}.attention.out.weight": ["model.layers.{}.self_attn.o_proj.weight"],
    "blocks.{}.attention.q_norm.weight": ["model.layers.{}.self_attn.q_norm.weight"],
    "blocks.{}.attention.k_norm.weight": ["model.layers.{}.self_attn.k_norm.weight"],
    "blocks.{}.ffn.w_in.weight": ["model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"],
    "blocks.{}.ffn.w_out.weight": ["model.layers.{}.mlp.down_proj.weight"],
    "blocks.{}.ffn.router.weight": ["model.layers.{}.mlp.gate.weight"],
    "blocks.{}.ffn.bank.w_in": ["model.layers.{}.mlp.experts.gate_up_proj"],
    "blocks.{}.ffn.bank.w_out": ["model.layers.{}.mlp.experts.down_proj"],
}
GPT2 = {"wte.weight": ["transformer.wte.weight"], "wpe.weight": ["transformer.wpe.weight"], "head.weight": ["lm_head.weight"]}
for _kind in ("weight", "bias"):
    GPT2 |= {
        f"norm.{_kind}": [f"transformer.ln_f.{_kind}"],
        f"blocks.{{}}.norm1.{_kind}": [f"transformer.h.{{}}.ln_1.{_kind}"],
        f"blocks.{{}}.norm2.{_kind}": [f"transformer.h.{{}}.ln_2.{_kind}"],
        f"blocks.{{}}.attention.qkv.{_kind}": [f"transformer.h.{{}}.attn.c_attn.{_kind}"],
        f"blocks.{{}}.attention.out.{_kind}": [f"transformer.h.{{}}.attn.c_proj.{_kind}"],
        f"blocks.{{}}.ffn.w_in.{_kind}": [f"transformer.h.{{}}.mlp.c_fc.{_kind}"],
        f"blocks.{{}}.ffn.w_out.{_kind}": [f"transformer.h.{{}}.mlp.c_proj.{_kind}"],
    }


def their_names(name, arch):
    """Our name of a parameter -> their names."""
    layer = re.search(r"\d+", name)
    pattern = name.replace(layer[0], "{}", 1) if layer else name
    return [theirs.format(layer and layer[0]) for theirs in (GPT2 if arch == "gpt2" else LLAMA)[pattern]]


def transposed(name, tensor, arch):
    """GPT-2 there keeps the matrices of its blocks as (in, out)."""
    return tensor.t() if arch == "gpt2" and name.startswith("blocks.") and tensor.ndim == 2 else tensor


def need_transformers():
    try:
        import transformers
        old = int(transformers.__version__.split(".")[0]) < 5
    except ImportError:
        raise ImportError('Hugging Face models need transformers: pip install -e ".[hf]"') from None
    if old:
        raise ImportError(f'transformers {transformers.__version__} is too old: pip install -e ".[hf]" brings 5 or later')
    transformers.utils.logging.disable_progress_bar()
    return transformers


# ---- in

@contextlib.contextmanager
def readable(name):
    """Turns what transformers raises (no folder, no such name, no network, damaged files, foreign code) into one line."""
    try:
        yield
    except ImportError:  # bitsandbytes or accelerate is missing: the message says which
        raise
    except Exception as error:  # safetensors, json and the hub have types of their own
        raise ValueError(f"{name}: no model that transformers can read ({str(error).splitlines()[0]})") from None


def load_theirs(name, **options):
    """transformers' model, by its name on the hub or its folder, in evaluation mode. Code that comes with it never runs. ValueError, naming
    them, for weights that the files lack, or have and the model has not, or that are of another shape."""
    transformers, reports = need_transformers(), []
    logger = logging.getLogger("transformers.modeling_utils")  # its report is the only place that names some of them
    logger.addFilter(collect := lambda record: reports.append(record.getMessage()))
    try:
        with readable(name):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except ValueError:
        found = {kind: re.findall(rf"^(\S.*?) *\| {kind.upper()}", "\n".join(reports), re.M) for kind in ("missing", "conversion")}
        refuse_incomplete(name, found)
        raise
    finally:
        logger.removeFilter(collect)
    require_finite(model, name)
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    refuse_incomplete(name, {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "of another shape": mismatched})
    return model.eval()


def require_finite(model, name):
    """ValueError, naming them, for weights that are NaN or infinite; name: where they come from."""
    bad = [key for key, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if bad:
        raise ValueError(f"{name}: NaN or infinite numbers in {len(bad)} weights, {bad[0]} among them: use an earlier checkpoint")


SPECIMEN = "def naïve(x):\n    return x ** 2  # 1,234.5 per cent\n\n\tIt's the “Straße” of 東京; we'll see… 😀\n"


def tokenizer_of(name, spec):
    """Which tokens the model `name` (on the hub, or a folder) reads: `spec` itself ("bytes", "gpt2", a .tiktoken file)
    where its tokenizer encodes text as that one does, else a description of its own. A folder without a tokenizer is taken to
    read `spec` if its vocabulary has that size, or is padded from it by less than 1,024."""
    transformers, ours = need_transformers(), get_tokenizer(spec)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if len(theirs) > 2:  # without files some classes come up with special tokens alone
            same = theirs(SPECIMEN, add_special_tokens=False).input_ids == ours.encode(SPECIMEN)
            return spec if same else f"{name}'s own ({type(theirs).__name__}, {len(theirs)} ids)"
    except Exception:  # no tokenizer there: a type of error for each way to find none
        pass
    with readable(name):
        size = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().vocab_size
    return spec if 0 <= size - ours.vocab_size < 1024 else f"{name}'s own ({size} ids)"


def refuse_incomplete(name, found):
    """found: {what is wrong: names of weights}; ValueError unless all are empty."""
    wrong = [f"{kind} {', '.join(sorted(keys)[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
             for kind, keys in found.items() if keys]
    if wrong:
        raise ValueError(f"{name}: its weights and its config.json do not belong together: {'; '.join(wrong)}; download it again")


def load(name):
    """A model of transformers', by its name on the hub or its folder, as a GPT in float32. ValueError, naming the reason,
    for one that would not compute the same here."""
    transformers = need_transformers()
    with readable(name):
        hf_config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    config = read_config(hf_config, name)
    weights = load_theirs(name, dtype="auto").state_dict()
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({ours: take(weights, ours, config.arch) for ours in model.state_dict()}, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.wte.weight  # `assign` had separated them
    if weights:
        raise ValueError(f"{name}: nothing here corresponds to {', '.join(sorted(weights)[:3])}")
    return model


def take(weights, name, arch):
    """Our parameter `name` out of their dictionary, which shrinks by it; float32."""
    parts = [weights.pop(theirs) for theirs in their_names(name, arch)]
    return transposed(name, torch.cat(parts), arch).float().contiguous()


def read_config(c, name):
    """Their config -> ModelConfig."""
    if c.model_type not in FAMILIES:
        raise ValueError(f"{name}: model type {c.model_type} is not implemented here; {', '.join(FAMILIES)} load")
    problems = [text for condition, text in differences(c) if condition]
    if problems:
        raise ValueError(f"{name}: {', '.join(problems)} is not implemented here; without it {', '.join(FAMILIES)} load")
    if c.model_type == "gpt2":
        return ModelConfig(arch="gpt2", n_layer=c.n_layer, n_head=c.n_head, d_model=c.n_embd, d_ff=c.n_inner, bias=True,
                           block_size=c.n_positions, vocab_size=c.vocab_size, norm_eps=c.layer_norm_epsilon,
                           tie_embeddings=c.tie_word_embeddings)
    settings = dict(arch="llama", n_layer=c.num_hidden_layers, n_head=c.num_attention_heads, d_model=c.hidden_size,
                    n_kv_head=c.num_key_value_heads, head_dim=getattr(c, "head_dim", None), d_ff=c.intermediate_size,
                    block_size=c.max_position_embeddings, vocab_size=c.vocab_size, norm_eps=c.rms_norm_eps, bias=False,
                    rope_base=c.rope_parameters["rope_theta"], tie_embeddings=c.tie_word_embeddings)
    if c.model_type != "llama":
        settings |= dict(flavour="topk", n_experts=c.num_local_experts if c.model_type == "mixtral" else c.num_experts,
                         top_k=c.num_experts_per_tok, d_expert=getattr(c, "moe_intermediate_size", c.intermediate_size),
                         norm_topk_prob=getattr(c, "norm_topk_prob", True), moe_every=getattr(c, "decoder_sparse_step", 1),
                         qk_norm=next(norm for norm, family in MOE_FAMILIES.items() if family == c.model_type))
    return ModelConfig(**settings)


def differences(c):
    """What their config may switch on and this repository does not have -> [(whether it is on, its name)]."""
    if c.model_type == "gpt2":
        return [(c.activation_function not in ("gelu_new", "gelu_pytorch_tanh"), f"activation_function={c.activation_function}"),
                (c.add_cross_attention, "add_cross_attention"), (not c.scale_attn_weights, "scale_attn_weights=False"),
                (c.scale_attn_by_inverse_layer_idx, "scale_attn_by_inverse_layer_idx")]
    window = getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
    rope = c.rope_parameters
    return [(rope.get("rope_type", "default") != "default", f"rope scaling (rope_type={rope.get('rope_type')})"),
            (rope.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor"),
            (window is not None and window < c.max_position_embeddings, f"sliding_window={window} below the context of "
             f"{c.max_position_embeddings}"), (c.hidden_act != "silu", f"hidden_act={c.hidden_act}"),
            *[(getattr(c, key, None), key) for key in ("attention_bias", "mlp_bias", "clip_qkv", "mlp_only_layers")]]


# ---- out

def export(model, folder, tokenizer=None):
    """Write `model` as safetensors + config.json (+ tokenizer files) that AutoModelForCausalLM.from_pretrained loads.
    ValueError, naming the reason, for what no architecture there can compute."""
    transformers = need_transformers()
    if Path(folder, "ckpt.pt").exists():
        raise ValueError(f"{folder} holds a checkpoint, whose config.json the export would replace: name another folder")
    config = transformers.AutoConfig.for_model(**their_config(model.config))
    eot = tokenizer.eot if tokenizer else None
    config.bos_token_id = config.eos_token_id = eot
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    weights = {}
    for ours, tensor in model.state_dict().items():
        names = their_names(ours, model.config.arch)
        tensor = transposed(ours, tensor, model.config.arch)
        sizes = [theirs.get_parameter(name).shape[0] for name in names]
        weights |= {name: part.contiguous() for name, part in zip(names, tensor.split(sizes))}
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    if tokenizer:
        export_tokenizer(transformers, tokenizer, model.config.block_size).save_pretrained(folder)


def their_config(c):
    """ModelConfig -> the arguments of AutoConfig.for_model."""
    reasons = [text for condition, text in obstacles(c) if condition]
    if reasons:
        raise ValueError(f"no architecture in transformers has {', '.join(reasons)}: dense gpt2, dense llama and "
                         "flavour=topk with private softmax experts can be exported")
    shape = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tie_embeddings, initializer_range=c.init_std, pad_token_id=None)
    if c.arch == "gpt2":
        return shape | dict(model_type="gpt2", n_layer=c.n_layer, n_head=c.n_head, n_embd=c.d_model, n_inner=c.d_ff,
                            n_positions=c.block_size, layer_norm_epsilon=c.norm_eps)
    shape |= dict(model_type="llama", num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, hidden_size=c.d_model,
                  num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, intermediate_size=c.d_ff, rms_norm_eps=c.norm_eps,
                  max_position_embeddings=c.block_size, rope_parameters={"rope_type": "default", "rope_theta": c.rope_base})
    if c.flavour == "dense":
        return shape
    family = MOE_FAMILIES[c.qk_norm]
    shape |= dict(model_type=family, num_experts_per_tok=c.top_k, norm_topk_prob=c.norm_topk_prob)
    if family == "qwen3_moe":
        return shape | dict(num_experts=c.n_experts, moe_intermediate_size=c.d_expert, decoder_sparse_step=c.moe_every)
    return shape | {"num_local_experts" if family == "mixtral" else "num_experts": c.n_experts, "intermediate_size": c.d_expert}


def obstacles(c):
    """What a config has that transformers' architectures lack -> [(whether it has it, its name)]."""
    experts = c.flavour not in ("dense", "infmoe")
    return [
        (c.flavour == "infmoe", "experts indexed by a continuous code (flavour=infmoe)"),
        (experts and c.arch == "gpt2", "experts in GPT-2 blocks (arch=gpt2)"),
        (experts and c.pool_groups, f"experts shared between layers (pool_groups={c.pool_groups})"),
        (experts and c.router != "softmax", f"these experts with router={c.router}"),
        (experts and c.balance == "bias", "a selection bias on softmax scores (balance=bias)"),
        (experts and c.n_shared_experts, f"always-on experts without a gate (n_shared_experts={c.n_shared_experts})"),
        (experts and c.qk_norm == "none" and not c.norm_topk_prob, "raw gates without qk_norm (norm_topk_prob=False; Mixtral's "
         "gates sum to 1)"),
        (experts and c.qk_norm != "head" and c.moe_every > 1, f"experts in some blocks only (moe_every={c.moe_every}), "
         "but for Qwen3-MoE (qk_norm=head)"),
        (experts and c.qk_norm == "full" and c.head_dim * c.n_head != c.d_model, f"OLMoE's norms with head_dim={c.head_dim}"),
        (c.flavour == "dense" and c.qk_norm != "none", f"qk_norm={c.qk_norm} in a dense {c.arch}"),
        (c.arch == "gpt2" and not c.bias, "GPT-2 without biases (bias=False)"),
        (c.arch == "llama" and c.bias, "LLaMA with all biases (bias=True)"),
    ]


def export_tokenizer(transformers, tokenizer, block_size):
    """A tiktoken encoding as one of transformers': the same vocabulary, and its ranks turned into merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    encoding, letters = tokenizer.encoding, bytes_to_unicode()  # a printable letter for each byte
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    spell = lambda token: "".join(letters[byte] for byte in token)
    known = {token for token, _ in ranks}
    merges = [(spell(token[:i]), spell(token[i:])) for token, _ in ranks for i in range(1, len(token))
              if token[:i] in known and token[i:] in known]
    bpe = Tokenizer(models.BPE({spell(token): rank for token, rank in ranks}, merges, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(encoding._pat_str), behavior="isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    end = AddedToken("<|endoftext|>", normalized=False, special=True)
    bpe.add_special_tokens([end])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, model_max_length=block_size)
