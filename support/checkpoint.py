"""Checkpoints: one loader, which checks every value before a model sees it.

A checkpoint is a dictionary (SCHEMA) that torch.save writes as a zip of plain tensors. It may come
from a stranger or from a failing disk, so it is checked in this order: the zip's sizes and
checksums, the names that its pickle may call, then keys, types, shapes and values against its own
model_config, on the meta device, where a model costs no memory.
"""

import hashlib
import math
import pickletools
import zipfile
from pathlib import Path

import torch

SCHEMA = {  # key: its types. The first two make a model, all but the last are needed to go on
    "model": dict, "model_config": dict, "optimizer": dict, "scaler": dict, "step": int,
    "seconds": (int, float), "val_loss": (int, float, type(None)), "tokenizer": str,
    "train_config": dict, "tokenizer_sha256": (str, type(None))}  # fmt: skip
CALLABLE = ("torch._utils _rebuild_tensor_v2", "collections OrderedDict")  # and names of storages


# ---- reading


def checkpoints(folder="out"):
    """All somewhere in `folder`, the newest first; FileNotFoundError where there are none."""
    found = sorted(Path(folder).glob("**/ckpt.pt"), key=lambda path: -path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no checkpoint under {folder}/: train one with  python train.py, "
                                "or name a folder by --out_dir")
    return found


def newest_run(folder="out"):
    """The folder of the checkpoint that was written last."""
    return checkpoints(folder)[0].parent


def load(path, config_class, model_class, resume=False):
    """The dictionary in a checkpoint, every value of it checked; tensors are on the CPU.

    config_class, model_class: what its model_config and its weights must fit. resume: what only a
    resumed run needs must be there, too. FileNotFoundError, or ValueError in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with  "
                                f"python train.py --out_dir={path.parent}")
    try:
        check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_keys(saved, resume)
        model = meta_model(saved, config_class, model_class)
        check_tensors("model", saved["model"], model.state_dict())
        if "optimizer" in saved:
            check_optimizer(saved["optimizer"], model)
        find_tokenizer(saved, path.parent)
        return saved
    except Exception as error:  # a damaged zip or pickle: zipfile, pickle and torch have many types
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = (str(error).splitlines() or ["damaged"])[0][:300]
        raise ValueError(f"{path} is no readable checkpoint ({kind}{reason}): train again with "
                         "--overwrite, or name another folder") from error


def require(condition, problem):
    if not condition:
        raise ValueError(problem)


def check_archive(path):
    """The zip holds no more than its size, its checksums are right, its pickle only tensors."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        require(unpacked <= path.stat().st_size, f"{unpacked:,} bytes packed into "
                f"{path.stat().st_size:,}: train.py does not compress")
        damaged = archive.testzip()
        require(damaged is None, f"the checksum of {damaged} is wrong: the file was damaged")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        require(len(pickles) == 1, "not written by torch.save")
        for operation, name, _ in pickletools.genops(archive.read(pickles[0])):
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                words = str(name).split(" ")
                storage = words[0] == "torch" and words[-1].endswith("Storage")
                require(storage or name in CALLABLE, f"it wants to call {name}")


def check_keys(saved, resume):
    """Keys and plain values."""
    require(isinstance(saved, dict), f"it holds a {type(saved).__name__}")
    needed = list(SCHEMA)[: -1 if resume else 2]
    missing = [key for key in needed if key not in saved]
    require(not missing, f"{', '.join(missing)} is missing")
    for key, value in saved.items():
        require(key in SCHEMA, f"unknown key {key!r:.80}")
        right = isinstance(value, SCHEMA[key]) and not isinstance(value, bool)
        require(right, f"{key} is a {type(value).__name__}")
        number = isinstance(value, (int, float))
        require(not number or 0 <= value < math.inf, f"{key} is {value!r:.80}")
    for key, value in saved.get("scaler", {}).items():
        number = type(value) in (int, float) and 0 <= value < math.inf
        require(number, f"scaler.{key} is {value!r:.80}")


def meta_model(saved, config_class, model_class):
    """The model that the checkpoint says it holds, without memory for its weights."""
    settings, n = saved["model_config"], len(saved["model"])
    for name in ("n_layer", "infmoe_depth"):  # a billion layers take long even without memory
        value = settings.get(name)
        require(type(value) is not int or value <= n, f"{name}={value} and {n} tensors")
    config = config_class(**settings)
    with torch.device("meta"):
        return model_class(config)


def check_tensors(what, tensors, expected):
    """Names, shapes, dtypes and layouts are those of `expected`, and every value is finite."""
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    require(not missing, f"{what} lacks {len(missing)} tensors, as {min(missing, default='')}")
    require(not unknown, f"{what} has tensors of no use, as {list(unknown)[:1]!r:.80}")
    for name, like in expected.items():
        value, where = tensors[name], f"{what}.{name}"
        require(isinstance(value, torch.Tensor), f"{where} is a {type(value).__name__}")
        shapes = tuple(value.shape), tuple(like.shape)
        require(shapes[0] == shapes[1], f"{where} has shape {shapes[0]}, its model {shapes[1]}")
        plain = value.layout == torch.strided and value.is_contiguous() and value.is_cpu
        require(plain and value.dtype == like.dtype, f"{where} is no dense tensor of {like.dtype}")
        extremes = value.detach().aminmax() if value.numel() else ()  # NaN is passed on
        finite = all(map(math.isfinite, extremes))
        require(finite, f"{where} holds NaN or infinite values")


# ---- optimizers


def parameter_groups(model):
    """Parameters with weight decay (all that multiplies), and without (norms, biases, scales).

    Checkpoints number the optimizer's states in this order.
    """
    params = list(model.parameters())
    return [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]


def check_optimizer(saved, model):
    """AdamW's states: one for each parameter, of its shape."""
    decayed, plain = parameter_groups(model)
    params, n = [*decayed, *plain], len(decayed)
    require(saved.keys() == {"state", "param_groups"}, "optimizer has other keys than AdamW's")
    numbers = [group["params"] for group in saved["param_groups"]]
    require(numbers == [list(range(n)), list(range(n, len(params)))], "optimizer: other parameters")
    states = saved["state"]
    require(list(states) == list(range(len(params))), "optimizer: states of other parameters")
    for i, param in enumerate(params):
        like = {"step": torch.zeros(()), "exp_avg": param, "exp_avg_sq": param}
        check_tensors(f"optimizer.{i}", states[i], like)
        require(states[i]["step"] >= 0 and not (states[i]["exp_avg_sq"] < 0).any(),
                f"optimizer.{i} holds a negative step or square")


# ---- the tokenizer of a run


def sha256_of(spec):
    """The hash of a tokenizer's file; None for the built-in ones, whose name says everything."""
    if not spec.endswith((".tiktoken", ".json")):
        return None
    return hashlib.sha256(Path(spec).read_bytes()).hexdigest()


def same_tokenizer(one, other):
    """Whether two specs mean one tokenizer: by name, or by what is in the files."""
    return one == other or sha256_of(one) == sha256_of(other) is not None


def copy_beside(spec, folder):
    """Where a run keeps its copy of a tokenizer's file."""
    return Path(folder, f"tokenizer{Path(spec).suffix}")


def find_tokenizer(saved, folder):
    """Point saved["tokenizer"] to the copy in the checkpoint's folder, if it is the right file."""
    expected, spec = saved.get("tokenizer_sha256"), saved.get("tokenizer")
    if expected is None:
        return
    copy = copy_beside(spec, folder)
    spec = str(copy) if copy.is_file() else spec
    require(Path(spec).is_file(), f"its tokenizer {spec} is gone")
    require(sha256_of(spec) == expected, f"{spec} is not the tokenizer that it was trained with")
    saved["tokenizer"] = spec
