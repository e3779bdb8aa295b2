"""
The Triton kernels compile for sm_80 (A100), sm_90 (H100, H200) and sm_120 (RTX 50, 100 KB of shared
memory) on a machine without a GPU: they fit the shared memory, spill no registers, and on sm_90
every 16-bit matrix product runs on the tensor cores' wgmma instructions.

    python tests/test_compile.py      # everything -> results/compile.md

TRITON_INTERPRET=0 makes kernels.py import Triton without a GPU, and a stand-in for the driver says
which architecture to compile for: both need a process of its own. The tests read what it prints.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {80: 166_912, 90: 232_448, 120: 101_376}  # bytes a program may have
D, F, E, T, K = 768, 3072, 8, 32768, 2
WIDE = 6144  # the FFN of infmoe_small


class StandIn:
    """What triton asks of a driver before it compiles. A device index per architecture: compiled
    code is cached by it."""
    architecture = 90
    get_current_device = lambda self: self.architecture
    get_current_stream = lambda self, device=None: 0
    get_active_torch_device = lambda self: torch.device("cpu")
    get_device_interface = lambda self: torch.cpu
    get_benchmarker = lambda self: lambda *_, **__: [0.0, 0.0, 0.0]

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.architecture, 32)


def cases(dtype, quick):
    """(name, kernel, arguments, constants), as kernels.py launches them."""
    import kernels
    from support import mask_kernels
    tensor = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    integers = lambda *shape: tensor(*shape, dtype=torch.int32)
    floats = lambda *shape: tensor(*shape, dtype=torch.float32)
    n, largest = T * K, 128 if dtype.itemsize == 2 else 64
    table, row = (integers(300), integers(300), integers(E), 264), integers(n)
    for act in ("swiglu",) if quick else ("swiglu", "gelu"):
        swiglu = act == "swiglu"
        w, wide = (1 + swiglu) * F, (1 + swiglu) * WIDE
        x, y, h, hidden = tensor(T, D), tensor(n, D), tensor(n, w), tensor(n, F)
        w_in, w_out = tensor(E, w, D), tensor(E, D, F)
        for rows in (largest,) if quick or not swiglu else (largest, 16):  # 16: few tokens each
            m, name = {"BLOCK_M": rows, "PRECISION": "ieee"}, f"{act}, {rows} rows"
            of_layer = {"D": D, "F": F, "SWIGLU": swiglu, **m}
            yield (f"up ({name})", kernels.up_kernel,
                   (x, w_in, h, hidden, row, *table), {"SAVE": True, **of_layer})
            for has_dact in (False,) if quick else (False, True):
                yield (f"act_backward ({name}{', dact' * has_dact})", kernels.act_backward_kernel,
                       (x, w_out, h, h, hidden, floats(96, n), tensor(n), hidden, row, row, *table,
                        n), {"HAS_DACT": has_dact, **of_layer})
            yield (f"down ({name})", kernels.down_kernel,
                   (hidden, w_out, y, tensor(n), row, *table),
                   {"IN": F, "OUT": D, "STRIDE_IN": 1, "STRIDE_OUT": F, "GATED": True, **m})
            yield (f"down, as dx ({name})", kernels.down_kernel,
                   (h, w_in, y, tensor(n), row, *table),
                   {"IN": w, "OUT": D, "STRIDE_IN": D, "STRIDE_OUT": 1, "GATED": False, **m})
        m = {"BLOCK_M": largest, "PRECISION": "ieee"}
        yield (f"weight_grad, of w_in ({act})", kernels.weight_grad_kernel,
               (h, x, w_in, row, row, integers(E)),
               {"OUT": w, "IN": D, "GATHER_GRAD": False, "GATHER_A": True, **m})
        yield (f"weight_grad, of a pool's w_in ({act})", kernels.weight_grad_kernel,
               (h, x, w_in, row, row, integers(E)),
               {"OUT": w, "IN": D, "GATHER_GRAD": True, "GATHER_A": True, **m})
        if swiglu:
            yield ("weight_grad, of w_out", kernels.weight_grad_kernel,
                   (x, hidden, w_out, row, row, integers(E)),
                   {"OUT": D, "IN": F, "GATHER_GRAD": True, "GATHER_A": False, **m})
        h, u, scores, cuts = tensor(T, wide), tensor(T, WIDE), tensor(T, K, WIDE), integers(T, K)
        low = 16 if dtype == torch.bfloat16 else 0
        yield (f"mask ({act})", mask_kernels.mask_kernel,
               (scores, h, u, floats(T, K), cuts, 1536, K),
               {"F": WIDE, "ACTIVATION": act, "LOW": low, "BLOCK": 8192, "num_warps": 16})
        yield (f"mask_backward ({act})", mask_kernels.mask_backward_kernel,
               (u, h, scores, floats(T, K), cuts, u, h, K),
               {"F": WIDE, "SWIGLU": swiglu, "BLOCK": 1024})
        yield (f"decode ({act})", mask_kernels.decode_kernel,
               (tensor(1, D), floats(1, WIDE), tensor(wide, D), tensor(WIDE, D), floats(1, 768, D)),
               {"D": D, "F": WIDE, "SWIGLU": swiglu, "BLOCK": 8, "BLOCK_D": 1024, "num_warps": 8})


def resources(cubin):
    """Registers a thread, and bytes of local memory for what does not fit: off the machine code."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", out.stdout))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def compiled(kernel, arguments, constants, config):
    """What one compilation takes. config: tiles, warps, stages; None where nothing is tuned."""
    options = constants | (config.all_kwargs() if config else {})
    kernel = kernel.fn if config else kernel
    found = kernel.warmup(*arguments, grid=(1,), **options)
    registers, spilled = resources(found.asm["cubin"])
    return dict(
        tiles={k: v for k, v in options.items() if k.startswith("BLOCK")},
        warps=found.metadata.num_warps, stages=found.metadata.num_stages if config else None,
        registers=registers, spilled_bytes=spilled, shared_bytes=found.metadata.shared,
        is_gemm=bool(config), wgmma=found.asm["ptx"].count("wgmma.mma_async"))


def compile_all(quick):
    """A dict per kernel, dtype, architecture and configuration. quick: bfloat16, swiglu and, as on
    sm_120, whose autotuner leaves out what does not fit, the first configuration."""
    import triton
    driver, rows = StandIn(), []
    triton.runtime.driver.set_active(driver)
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        for name, kernel, arguments, constants in cases(dtype, quick):
            for driver.architecture in SHARED_LIMIT:
                configs = [None]
                if hasattr(kernel, "prune_configs"):  # it is tuned: a matrix product
                    kernel.nargs = dict(zip(kernel.arg_names, arguments))
                    configs = kernel.prune_configs(constants)
                for config in configs[:1] if quick or driver.architecture == 120 else configs:
                    row = dict(kernel=name, dtype=str(dtype)[6:], sm=driver.architecture)
                    rows.append(row | compiled(kernel, arguments, constants, config))
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def write_table(rows, file):
    import triton
    limits = ", ".join(f"{limit:,} bytes on sm_{sm}" for sm, limit in SHARED_LIMIT.items())
    table = ["| kernel | dtype | sm | tiles | warps | stages "
             "| registers | spilled | shared | wgmma |", "|---" * 10 + "|"]
    for r in rows:
        tiles = " ".join(f"{k[6:] or 'F'}={v}" for k, v in r["tiles"].items())
        cells = (r["kernel"], r["dtype"], r["sm"], tiles, r["warps"], r["stages"] or "-",
                 r["registers"], r["spilled_bytes"], f"{r['shared_bytes']:,}", r["wgmma"] or "-")
        table.append(f"| {' | '.join(map(str, cells))} |")
    file.write_text(f"""# The Triton kernels, compiled without a GPU

`python tests/test_compile.py` wrote this file, with triton {triton.__version__}.
Shapes: D = {D}, F = {F}, E = {E}; masked FFN: F = {WIDE}.
Shared memory a program may have: {limits}.
Spilled: bytes of local memory a thread, 0 wanted. Shared: bytes of shared memory. wgmma:
instructions in the PTX (sm_90, 16-bit products).

""" + "\n".join(table) + "\n")


linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")


def check(rows):
    for r in rows:
        assert r["shared_bytes"] <= SHARED_LIMIT[r["sm"]], r
        # on sm_120 the compiler puts two numbers of some float32 products aside, at 80 registers
        assert r["spilled_bytes"] <= 8 * (r["sm"] == 120 and r["dtype"] == "float32"), r
        if r["is_gemm"] and r["sm"] == 90 and r["dtype"] != "float32":
            assert r["wgmma"] > 0 or r["tiles"]["BLOCK_M"] < 64, r


def run(*options):
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *options]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


@linux
def test_every_kernel_compiles_as_it_is_used_most():
    rows = run("--quick")
    names = {r["kernel"].split(" ")[0].rstrip(",") for r in rows}
    assert names == {"up", "down", "act_backward", "weight_grad", "mask", "mask_backward", "decode"}
    assert {r["sm"] for r in rows} == {80, 90, 120}
    check(rows)


@linux
@pytest.mark.slow
def test_every_configuration_compiles(tmp_path):
    table = tmp_path / "compile.md"
    rows = run(f"--out={table}")
    check(rows)
    assert len(rows) > 100 and table.read_text().count("\n| ") == len(rows) + 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first configuration in bfloat16")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "compile.md")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["TRITON_INTERPRET"] = "0"
    found = compile_all(options.quick)
    if not options.quick:
        write_table(found, options.out)
    check(found)
