"""Hugging Face in and out: transformers' checkpoints as a GPT, and a GPT as a folder for AutoModel.

    model = GPT.from_hf("allenai/OLMoE-1B-7B-0924")       # gpt2, llama, mixtral, olmoe, qwen3_moe
    python train.py --init_from=hf:allenai/OLMoE-1B-7B-0924 --dataset=...
    python model.py --out_dir=out/x --export=DIR          # dense GPT-2 and LLaMA; topk experts as
                                                          # Mixtral, OLMoE (qk_norm=full) or
                                                          # Qwen3-MoE (qk_norm=head)

One table of names per family serves both directions. What would not give the same logits is
refused, with the reason, and so is a folder with weights missing, misshapen or not finite.
"""
import contextlib
import logging
import re
from pathlib import Path

import torch

from model import GPT, ModelConfig
from support.tokenizer import HubTokenizer
from support.usage import optional

MOE_FAMILIES = {"none": "mixtral", "full": "olmoe", "head": "qwen3_moe"}  # by qk_norm

# Settings: ours, theirs.
SETTINGS = {
    "gpt2": dict(
        vocab_size="vocab_size", tie_embeddings="tie_word_embeddings", n_layer="n_layer",
        n_head="n_head", d_model="n_embd", d_ff="n_inner", block_size="n_positions",
        norm_eps="layer_norm_epsilon"),
    "llama": dict(
        vocab_size="vocab_size", tie_embeddings="tie_word_embeddings", n_layer="num_hidden_layers",
        n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim",
        d_model="hidden_size", d_ff="intermediate_size", block_size="max_position_embeddings",
        norm_eps="rms_norm_eps")}
MOE = SETTINGS["llama"] | dict(
    top_k="num_experts_per_tok", norm_topk_prob="norm_topk_prob", d_expert="intermediate_size")
SETTINGS |= {
    "mixtral": MOE | dict(n_experts="num_local_experts"),
    "olmoe": MOE | dict(n_experts="num_experts"),
    "qwen3_moe": MOE | dict(n_experts="num_experts", d_expert="moe_intermediate_size",
                            moe_every="decoder_sparse_step")}
FAMILIES = tuple(SETTINGS)
ABSENT = dict(norm_topk_prob=True)  # what a family without the setting does

# Weights: ours <- theirs; several of theirs are stacked along the first dimension.
LLAMA = {"wte.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"],
         "head.weight": ["lm_head.weight"]}
LLAMA_BLOCK = {  # blocks.{i}. <- model.layers.{i}.
    "norm1.weight": ["input_layernorm.weight"],
    "norm2.weight": ["post_attention_layernorm.weight"],
    "attention.qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "ffn.w_in.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "ffn.w_out.weight": ["mlp.down_proj.weight"],
    "ffn.router.weight": ["mlp.gate.weight"],
    "ffn.bank.w_in": ["mlp.experts.gate_up_proj"],
    "ffn.bank.w_out": ["mlp.experts.down_proj"],
}
GPT2 = {"wte": "transformer.wte", "wpe": "transformer.wpe", "norm": "transformer.ln_f",
        "head": "lm_head"}
GPT2_BLOCK = {  # blocks.{i}. <- transformer.h.{i}., weights and biases alike
    "norm1": "ln_1", "norm2": "ln_2", "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj", "ffn.w_in": "mlp.c_fc", "ffn.w_out": "mlp.c_proj"}


def their_names(name, arch):
    """Our name of a parameter -> their names."""
    block = re.match(r"blocks\.(\d+)\.(.*)", name)
    inner = block[2] if block else name
    if arch == "gpt2":
        module, _, kind = inner.rpartition(".")
        start = f"transformer.h.{block[1]}." if block else ""
        return [f"{start}{(GPT2_BLOCK if block else GPT2)[module]}.{kind}"]
    start = f"model.layers.{block[1]}." if block else ""
    return [start + theirs for theirs in (LLAMA_BLOCK if block else LLAMA)[inner]]


def transposed(name, tensor, arch):
    """GPT-2 there keeps the matrices of its blocks as (in, out)."""
    return tensor.mT if arch == "gpt2" and "blocks." in name and tensor.ndim == 2 else tensor


def need_transformers():
    """transformers, from version 5 on; ImportError in one line."""
    transformers = optional("transformers", "hf")
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers {transformers.__version__} is too old: "
                          'pip install -e ".[hf]" brings 5 or later')
    transformers.utils.logging.disable_progress_bar()
    return transformers


# ---- in

def load(name: str) -> GPT:
    """A model of transformers', by its name on the hub or its folder, as a GPT in float32.

    ValueError, naming the reason, for one that would not compute the same here.
    """
    transformers = need_transformers()
    with readable(name):
        theirs = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    config = read_config(theirs, name)
    weights = load_theirs(name, dtype="auto").state_dict()
    with torch.device("meta"):
        model = GPT(config)
    ours = {}
    for key in model.state_dict():  # `weights` shrinks by what is taken
        parts = [weights.pop(name) for name in their_names(key, config.arch)]
        ours[key] = transposed(key, torch.cat(parts), config.arch).float().contiguous()
    model.load_state_dict(ours, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.wte.weight  # `assign` had separated them
    if weights:
        raise ValueError(f"{name}: nothing here corresponds to {', '.join(sorted(weights)[:3])}")
    return model


@contextlib.contextmanager
def readable(name):
    """One line for whatever transformers raises: no folder, no network, damage, foreign code."""
    try:
        yield
    except ImportError:  # bitsandbytes or accelerate is missing: the message says which
        raise
    except Exception as error:  # safetensors, json and the hub have types of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: no model that transformers can read ({reason})") from None


def load_theirs(name: str, **options):
    """transformers' model, by its name on the hub or its folder, in evaluation mode.

    Code that comes with it never runs. ValueError, naming them, for weights that the files lack,
    that the model has no use for, of another shape, or not finite.
    """
    transformers, reports = need_transformers(), []
    collect = lambda record: reports.append(record.getMessage())  # returns None: nothing is printed
    logger = logging.getLogger("transformers.modeling_utils")  # alone names what it cannot convert
    logger.addFilter(collect)
    try:
        with readable(name):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True, **options)
    except ValueError:
        rows = re.findall(r"^(\S.*?) *\| (?:MISSING|CONVERSION)", "\n".join(reports), re.M)
        refuse_incomplete(name, {"missing": set(rows)})
        raise
    finally:
        logger.removeFilter(collect)
    refuse_incomplete(name, {
        "missing": info["missing_keys"], "unexpected": info["unexpected_keys"],
        "of another shape": [key for key, *_ in info["mismatched_keys"]]})
    require_finite(model, name)
    return model.eval()


def refuse_incomplete(name, found):
    """found: {what is wrong: names of weights}; ValueError unless all are empty."""
    wrong = [f"{len(keys)} {kind}, such as {min(keys)}" for kind, keys in found.items() if keys]
    if wrong:
        raise ValueError(f"{name}: the weights do not fit config.json ({'; '.join(wrong)}): "
                         "an incomplete download?")


def require_finite(model, name):
    """ValueError for weights that are NaN or infinite; name: where they come from."""
    if bad := [key for key, p in model.named_parameters()
               if p.is_floating_point() and not p.isfinite().all()]:
        raise ValueError(f"{name}: NaN or infinite numbers in {len(bad)} weights, {bad[0]} among "
                         "them: use an earlier checkpoint")


def read_config(c, name):
    """Their config -> ModelConfig."""
    if c.model_type not in FAMILIES:
        raise ValueError(f"{name}: model type {c.model_type} is not implemented here; "
                         f"{', '.join(FAMILIES)} load")
    if problems := [text for condition, text in differences(c) if condition]:
        raise ValueError(f"{name}: {', '.join(problems)} is not implemented here; without it "
                         f"{', '.join(FAMILIES)} load")
    settings = {ours: getattr(c, theirs, ABSENT.get(ours))
                for ours, theirs in SETTINGS[c.model_type].items()}
    if c.model_type == "gpt2":
        return ModelConfig(arch="gpt2", bias=True, **settings)
    if c.model_type != "llama":
        norms = {family: norm for norm, family in MOE_FAMILIES.items()}
        settings |= dict(flavour="topk", qk_norm=norms[c.model_type])
    rope_base = c.rope_parameters["rope_theta"]
    return ModelConfig(arch="llama", bias=False, rope_base=rope_base, **settings)


def differences(c):
    """What their config may switch on and is not here -> [(whether it is on, its name)]."""
    if c.model_type == "gpt2":
        known = c.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        return [(not known, f"activation_function={c.activation_function}"),
                (c.add_cross_attention, "add_cross_attention"),
                (not c.scale_attn_weights, "scale_attn_weights=False"),
                (c.scale_attn_by_inverse_layer_idx, "scale_attn_by_inverse_layer_idx")]
    window = getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
    context, rope = c.max_position_embeddings, c.rope_parameters
    kind = rope.get("rope_type", "default")
    return [(kind != "default", f"rope scaling (rope_type={kind})"),
            (rope.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor"),
            (window is not None and window < context,
             f"sliding_window={window} below the context of {context}"),
            (c.hidden_act != "silu", f"hidden_act={c.hidden_act}"),
            *[(getattr(c, key, None), key)
              for key in ("attention_bias", "mlp_bias", "clip_qkv", "mlp_only_layers")]]


# ---- out

def export(model: GPT, folder: str, tokenizer=None):
    """Write `model` as a folder (safetensors, config.json, tokenizer) that AutoModel loads.

    ValueError, naming the reason, for what no architecture there can compute.
    """
    transformers = need_transformers()
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{folder} is a file: name a folder to write")
    if Path(folder, "ckpt.pt").exists():
        raise ValueError(f"{folder} holds a checkpoint, whose config.json the export would "
                         "replace: name another folder")
    config = transformers.AutoConfig.for_model(**their_config(model.config))
    config.bos_token_id = config.eos_token_id = tokenizer.eot if tokenizer else None
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    weights, arch = {}, model.config.arch
    for ours, tensor in model.state_dict().items():
        names = their_names(ours, arch)
        sizes = [theirs.get_parameter(name).shape[0] for name in names]
        parts = transposed(ours, tensor, arch).split(sizes)
        weights |= {name: part.contiguous() for name, part in zip(names, parts)}
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    if tokenizer:
        export_tokenizer(transformers, tokenizer, model.config.block_size).save_pretrained(folder)


def their_config(c):
    """ModelConfig -> the arguments of AutoConfig.for_model."""
    if reasons := [text for condition, text in obstacles(c) if condition]:
        raise ValueError(f"no architecture in transformers has {', '.join(reasons)}: dense gpt2, "
                         "dense llama and topk with private softmax experts can be exported")
    family = c.arch if c.flavour == "dense" else MOE_FAMILIES[c.qk_norm]
    settings = {theirs: getattr(c, ours) for ours, theirs in SETTINGS[family].items()}
    if c.arch == "llama":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_base}
    return settings | dict(model_type=family, initializer_range=c.init_std, pad_token_id=None)


def obstacles(c):
    """What a config has and transformers' architectures lack -> [(whether it has it, its name)]."""
    experts, norm = c.flavour not in ("dense", "infmoe"), c.qk_norm
    return [
        (c.flavour == "infmoe", "experts indexed by a continuous code (flavour=infmoe)"),
        (experts and c.arch == "gpt2", "experts in GPT-2 blocks (arch=gpt2)"),
        (experts and c.pool_groups, f"experts shared between layers (pool_groups={c.pool_groups})"),
        (experts and c.router != "softmax", f"these experts with router={c.router}"),
        (experts and c.expert != "ffn", f"experts of the kind expert={c.expert}"),
        (experts and c.depth_embedding, "a vector added for each layer (depth_embedding=True)"),
        (experts and c.balance == "bias", "a selection bias on softmax scores (balance=bias)"),
        (experts and c.n_shared_experts,
         f"always-on experts without a gate (n_shared_experts={c.n_shared_experts})"),
        (experts and norm == "none" and not c.norm_topk_prob,
         "raw gates without qk_norm (norm_topk_prob=False; Mixtral's gates sum to 1)"),
        (experts and norm != "head" and c.moe_every > 1,
         f"experts in some blocks (moe_every={c.moe_every}), but for Qwen3-MoE (qk_norm=head)"),
        (experts and norm == "full" and c.head_dim * c.n_head != c.d_model,
         f"OLMoE's norms with head_dim={c.head_dim}"),
        (c.flavour == "dense" and norm != "none", f"qk_norm={norm} in a dense {c.arch}"),
        (c.arch == "gpt2" and c.activation != "gelu", "GPT-2 blocks with activation=swiglu"),
        (c.arch == "llama" and c.activation != "swiglu", "LLaMA blocks with activation=gelu"),
        (c.arch == "gpt2" and not c.bias, "GPT-2 without biases (bias=False)"),
        (c.arch == "llama" and c.bias, "LLaMA with all biases (bias=True)"),
    ]


def export_tokenizer(transformers, tokenizer, block_size):
    """A tokenizer of ours as one of transformers', which has a converter of tiktoken's ranks."""
    encoding, end = tokenizer.encoding, "<|endoftext|>"
    if isinstance(tokenizer, HubTokenizer):
        theirs, end = encoding, encoding.id_to_token(tokenizer.eot)
    else:
        from transformers.convert_slow_tokenizer import TikTokenConverter
        converter = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=[end])
        converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # not from a file
        theirs = converter.converted()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=theirs, bos_token=end, eos_token=end, model_max_length=block_size)
