"""What a ModelConfig means where a field is None, and what it may not be.

Rules are flat tables of (condition, message), read in order: a later one may rely on the earlier.
"""
import dataclasses
import math
from typing import get_args, get_type_hints

COEFFICIENTS = {"none": 0.0, "bias": 1e-3}  # V3's rate; balance losses have 1e-2, as in Switch
MAY_BE_ZERO = ("n_shared_experts", "pool_groups", "lock_steps", "infmoe_mean_from", "infmoe_hidden")
LARGEST = {  # building or holding more takes minutes, or more than any machine has
    "n_layer": 2000, "block_size": 2**22, "n_experts": 10**7, "infmoe_depth": 100}
OF_THE_BACKBONE = (
    "arch", "activation", "flavour", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff",
    "head_dim", "block_size", "vocab_size", "dropout", "bias", "qk_norm", "norm_eps",
    "tie_embeddings", "rope_base", "init_std", "backend")
OF_DISCRETE_EXPERTS = ("expert", "n_experts", "top_k", "n_shared_experts", "router",
                       "norm_topk_prob", "balance_scores", "z_coef", "coupling_coef", "coupling",
                       "depth_embedding", "lock_steps", "lock_coef")


def check(rules):
    """ValueError with the message of the first rule whose condition does not hold."""
    for condition, message in rules:
        if not condition:
            raise ValueError(message)


def type_rules(config):
    """Each field's type, as on the command line: 1 may stand for 1.0."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = get_args(hint) or (hint,)  # int | None -> int, NoneType
        allowed = [a for kind in kinds for a in get_args(kind) or (kind,)]  # Literal["a"] -> "a"
        if type(value) is int and float in allowed:
            value = float(value)
            setattr(config, name, value)
        words = " | ".join(getattr(a, "__name__", a) for a in allowed).replace("NoneType", "None")
        right = type(value) in allowed or (isinstance(value, str) and value in allowed)
        yield right, f"{name}={value!r:.80}: expected {words}"


def value_rules(config):
    """Each field by itself: its type and its range."""
    yield from type_rules(config)
    for name, value in vars(config).items():
        if type(value) is int:
            least, most = int(name not in MAY_BE_ZERO), LARGEST.get(name, 2**40)
            yield value >= least, f"{name}={value} must be at least {least}"
            yield value <= most, f"{name}={value} is more than {most}, the most for this code"
        if type(value) is float:
            finite = 0 <= value < math.inf
            yield finite, f"{name}={value} must be finite and not negative"


def resolve(c, flavours, routers):
    """Fill every None of a config that means something; what has no meaning stays None.

    flavours: {name: {field: value}}; routers: {name: class}.
    """
    def default(**values):
        for name, value in values.items():
            if getattr(c, name) is None:
                setattr(c, name, value)

    gpt2 = c.arch == "gpt2"
    default(n_kv_head=c.n_head, d_ff=4 * c.d_model, head_dim=c.d_model // max(1, c.n_head),
            bias=gpt2, tie_embeddings=gpt2, activation="gelu" if gpt2 else "swiglu")
    if c.flavour == "dense":
        return
    preset = {"pool_groups": 0, **flavours[c.flavour]}
    if c.top_k == 1:  # a gate divided by itself is 1: no gradient would reach the router
        preset["norm_topk_prob"] = False
    if c.balance == "none":
        preset.pop("balance_coef", None)
    if c.infmoe_share_mask:
        preset["infmoe_z"] = "shared"
    default(**preset)
    default(balance_coef=COEFFICIENTS.get(c.balance, 1e-2))
    if c.flavour == "infmoe":
        default(d_expert=2 * c.d_ff)
        return
    layers = len(c.moe_layers())
    default(expert="ffn", n_shared_experts=0, d_expert=c.d_ff,
            n_experts=8 * layers // max(1, c.pool_groups or layers), depth_embedding=False)
    if c.router == "lock":
        default(lock_steps=1000, lock_coef=5e-3)
    if c.balance not in ("none", "bias"):
        default(balance_scores=routers[c.router].balance_scores)


def rules(c, given, router=None):
    """All rules of a resolved config. given: fields set by hand; router: the class it names."""
    yield from backbone_rules(c, given)
    defaults = {f.name: f.default for f in dataclasses.fields(c)}
    given = [n for n in given if getattr(c, n) != defaults[n]]
    if c.flavour == "dense":
        names = [n for n in given if n not in OF_THE_BACKBONE]
        yield not names, (f"{', '.join(names)} has no meaning with flavour=dense: choose another "
                          "flavour or leave it out")
        return
    if c.flavour == "infmoe":
        yield from infmoe_rules(c, given)
        yield from depth_rules(c)
        if c.infmoe_share_mask:
            yield from share_mask_rules(c, given)
        yield from pool_rules(c)
    else:
        yield from discrete_rules(c, given, router)
        yield from pool_rules(c)
        yield from lock_rules(c)


def backbone_rules(c, given):
    yield "head_dim" in given or c.d_model % c.n_head == 0, (
        f"n_head={c.n_head} must divide d_model={c.d_model}, or head_dim be set")
    yield c.n_head % c.n_kv_head == 0, f"n_kv_head={c.n_kv_head} must divide n_head={c.n_head}"
    yield c.head_dim * c.n_head == c.d_model or c.arch == "llama", (
        f"head_dim={c.head_dim} times n_head={c.n_head} must be d_model={c.d_model} for arch=gpt2")
    yield c.head_dim % 2 == 0 or c.arch == "gpt2", (
        f"head_dim={c.head_dim} must be even for rotary positions")
    yield c.dropout < 1, f"dropout={c.dropout} must lie in [0, 1)"
    for name in ("norm_eps", "rope_base"):
        yield getattr(c, name) > 0, f"{name}={getattr(c, name)} must be positive"


def discrete_rules(c, given, router):
    names = [n for n in given if n.startswith("infmoe_")]
    yield not names, (f"{', '.join(names)} has no meaning with flavour={c.flavour}: set "
                      "flavour=infmoe or leave it out")
    yield c.top_k <= c.n_experts, (
        f"top_k={c.top_k} must lie between 1 and n_experts={c.n_experts}")
    yield router.max_top_k is None or c.top_k <= router.max_top_k, (
        f"router={c.router} chooses at most {router.max_top_k} experts, not top_k={c.top_k}")
    yield c.pool_groups or not router.pooled, (
        f"router={c.router} deals out a pool: set pool_groups >= 1, not {c.pool_groups}")
    yield not (c.norm_topk_prob and c.top_k == 1), (
        "norm_topk_prob=True with top_k=1 makes every gate 1 and leaves the router without "
        "gradient: set norm_topk_prob=False or top_k >= 2")
    wanted = {f"balance={c.balance}": c.balance * (c.balance != "none"),
              f"z_coef={c.z_coef}": "z" * bool(c.z_coef),
              f"coupling_coef={c.coupling_coef}": "coupling" * bool(c.coupling_coef)}
    names = [name for name, part in wanted.items() if part and part not in router.supports]
    yield not names, (f"router={c.router} does not support {', '.join(names)}: its scores cannot "
                      "be trained by that; choose another router or leave it out")
    yield not c.specialization_coef or c.top_k >= 2, (
        f"specialization_coef={c.specialization_coef} compares the experts of one token: it needs "
        "top_k >= 2, or specialization_coef=0")
    yield not c.specialization_coef or c.expert != "neuron" or c.d_expert > 1, (
        f"specialization_coef={c.specialization_coef} has no gradient where an expert is one "
        "neuron: set d_expert >= 2, or specialization_coef=0")
    yield not c.coupling_coef or len(c.moe_layers()) >= 2, (
        f"coupling_coef={c.coupling_coef} couples adjacent expert layers, and n_layer={c.n_layer} "
        f"with moe_every={c.moe_every} leaves one: set coupling_coef=0")
    yield c.coupling == "mass" or c.coupling_coef, (
        f"coupling={c.coupling} does nothing without coupling_coef: set coupling_coef (the paper "
        "uses 1e-3) or leave coupling out")
    yield c.balance not in ("none", "bias") or c.balance_scores is None, (
        f"balance_scores={c.balance_scores} does nothing with balance={c.balance}: set "
        "balance=layer or pool, or leave balance_scores out")


def lock_rules(c):
    names = [n for n in ("lock_steps", "lock_coef") if getattr(c, n) is not None]
    yield c.router == "lock" or not names, (
        f"{', '.join(names)} is for router=lock, not router={c.router}: leave it out")
    if c.router == "lock":
        layers = len(c.moe_layers()) // max(1, c.pool_groups)
        yield c.n_experts % layers == 0, (
            f"router=lock gives each of the {layers} layers of a pool as many experts: "
            f"n_experts={c.n_experts} must be a multiple of {layers}")
        yield c.top_k <= c.n_experts // layers, (
            f"router=lock leaves a layer {c.n_experts // layers} experts, fewer than "
            f"top_k={c.top_k}: raise n_experts")


def pool_rules(c):
    layers, groups = len(c.moe_layers()), c.pool_groups
    yield layers > 0, f"moe_every={c.moe_every} leaves no block of n_layer={c.n_layer} with experts"
    yield groups == 0 or layers % groups == 0, (
        f"pool_groups={groups} must divide the {layers} layers with experts")
    yield c.balance != "pool" or groups > 0, (
        "balance=pool needs a pool: set pool_groups >= 1, or balance=layer for private experts "
        "(pool_groups=0)")
    yield c.balance != "none" or not c.balance_coef, (
        f"balance_coef={c.balance_coef} does nothing with balance=none: set balance, or "
        "balance_coef=0")


def infmoe_rules(c, given):
    names = [n for n in OF_DISCRETE_EXPERTS if n in given]
    yield not names, (f"{', '.join(names)} belongs to discrete routers, not to flavour=infmoe: "
                      "leave it out")
    yield c.balance in ("none", "layer"), (
        f"balance={c.balance} has no meaning with flavour=infmoe: set balance=none or "
        "balance=layer")
    yield c.backend != "grouped", (
        "backend=grouped multiplies discrete experts and flavour=infmoe has none: set "
        "backend=auto, loop or triton")
    yield not c.specialization_coef or (c.infmoe_samples >= 2 and not c.infmoe_mean), (
        f"specialization_coef={c.specialization_coef} compares the samples of one token: it needs "
        "infmoe_samples >= 2 and infmoe_mean=False, or specialization_coef=0")


def depth_rules(c):
    rates, depth, start = c.rates(), c.infmoe_depth, c.infmoe_mean_from
    masked = [r for r in rates if r is not None]
    numbers = all(isinstance(r, (int, float)) and 0 < r <= 1 for r in masked)
    yield len(rates) == depth, (
        f"infmoe_rate={c.infmoe_rate} has {len(rates)} entries and infmoe_depth={depth}: give one "
        "rate per hidden layer")
    yield numbers, (f"infmoe_rate={c.infmoe_rate} must lie in (0, 1], or be None for a hidden "
                    "layer without mask")
    yield masked, "infmoe_rate=None everywhere masks nothing: use flavour=dense"
    yield start is None or 0 <= start < depth, (
        f"infmoe_mean_from={start} must lie between 0 and infmoe_depth - 1 = {depth - 1}")
    yield not (c.infmoe_mean and start), (
        f"infmoe_mean=True makes every z = mu: leave infmoe_mean_from={start} out")
    sampled = [r for r in rates[:depth if start is None else start] if r is not None]
    yield not c.specialization_coef or sampled, (
        f"specialization_coef={c.specialization_coef} compares samples and infmoe_mean_from="
        f"{start} leaves none: set specialization_coef=0")


def share_mask_rules(c, given):
    rates, start = c.rates(), c.infmoe_mean_from
    yield len(rates) > 1, (
        "infmoe_share_mask=True shares a mask between hidden layers: set infmoe_depth >= 2")
    yield len(set(rates)) == 1, ("infmoe_share_mask=True needs one rate for all hidden layers, "
                                 f"not infmoe_rate={c.infmoe_rate}")
    yield not start, (
        f"infmoe_share_mask=True uses one z: infmoe_mean_from={start} must be 0 or left out")
    yield c.infmoe_z == "shared" or "infmoe_z" not in given, (
        f"infmoe_share_mask=True uses one z: set infmoe_z=shared, not infmoe_z={c.infmoe_z}")


def training_rules(c):
    """Of a TrainConfig."""
    yield from type_rules(c)
    counts = ("max_steps", "batch_tokens", "micro_batch", "eval_tokens", "log_every", "timeout")
    for name, value in vars(c).items():
        if isinstance(value, (int, float)):
            low = int(name in counts)  # the comparison is false for NaN, too
            yield (low <= value < 1e15,
                   f"{name}={value!s:.40} must be at least {low} and below 10^15")
        yield (value != "" or name == "wandb",
               f"{name} is empty: give it a value, or leave it out")
    for name in ("beta1", "beta2"):
        yield getattr(c, name) < 1, f"{name}={getattr(c, name)} must be below 1"
    yield (c.min_lr is None or c.min_lr <= c.lr,
           f"min_lr={c.min_lr} must lie between 0 and lr={c.lr}: change it or leave it out")
    yield (c.shard == "none" or c.dtype != "float16",
           f"shard={c.shard} needs dtype=bfloat16 or float32, not float16")
