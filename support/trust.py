"""Is a kernel right on this GPU, with this compiler? Its first result of each shape is compared."""
import warnings

import torch
from torch import Tensor

_trusted = {}  # (step, device, dtype, shapes) -> whether the kernel's first result was torch's


def first_of(arguments):
    """The tensor whose device and dtype say where a step runs."""
    return arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]


def trusted(step, in_triton, in_torch, arguments):
    """Whether the kernel agreed with torch when it met this shape first. If not, say so once."""
    x = first_of(arguments)
    if not x.numel():  # nothing to compare: torch's, this once
        return False
    shapes = [len(a) if isinstance(a, list) else a.shape[1:]
              for a in arguments if isinstance(a, (Tensor, list))]
    key = (step, x.device, x.dtype, *shapes)
    if key not in _trusted:
        expected, problem = in_torch(*arguments), None
        try:
            error = max(map(distance, in_triton(*arguments), expected))
            if not error < (0.03 if x.element_size() == 2 else 3e-3):
                problem = f"is off by {error:.1e}"
        except Exception as failure:  # of the compiler or the launch: torch can do without
            if isinstance(failure, torch.OutOfMemoryError):
                raise
            reason = str(failure).strip().partition("\n")[0]
            problem = f"fails ({type(failure).__name__}: {reason})"
        if problem:
            where = f"in {x.dtype} on {x.device}"
            warnings.warn(f"the kernel for {step} {problem} {where}: not used", stacklevel=2)
        _trusted[key] = problem is None
    return _trusted[key]


def distance(a, b):
    """|a - b| / |b| (in one copy: a pool's gradient fills gigabytes); NaN is infinitely far."""
    a, b = (v if v.is_floating_point() else v.double() for v in (a, b))
    far, size = (torch.linalg.vector_norm(v, dtype=torch.float64) for v in (a - b, b))
    return (far / size.clamp_min(1e-30)).nan_to_num(float("inf")).item()
