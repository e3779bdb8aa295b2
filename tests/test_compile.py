"""
The Triton kernels compile for sm_80 (A100), sm_90 (H100, H200) and sm_120 (RTX 50, 100 KB of shared
memory) on a machine without a GPU: they fit the shared memory, spill no registers, and on sm_90
every 16-bit matrix product runs on the tensor cores' wgmma instructions.

    python tests/test_compile.py      # everything -> results/compile.json and compile.md

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

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        return lambda *_, **__: [0.0, 0.0, 0.0]


def cases(dtype, quick):
    """(name, kernel, arguments, constants, is it a matrix product), as kernels.py launches them."""
    import kernels as tk
    tensor = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    integers = lambda *shape: tensor(*shape, dtype=torch.int32)
    table = (integers(300), integers(300), integers(E), 264)
    n = T * K
    precision = {"PRECISION": "ieee"}
    largest = 128 if dtype.itemsize == 2 else 64
    few = () if quick else (16,)  # rows of a tile where an expert has few tokens
    for swiglu in (True,) if quick else (True, False):
        w = 2 * F if swiglu else F
        act = "swiglu" if swiglu else "gelu"
        for rows in (largest, *few) if swiglu else (largest,):
            m = {"BLOCK_M": rows, **precision}
            name = f"{act}, {rows} rows"
            yield (f"up ({name})", tk.up_kernel,
                   (tensor(T, D), tensor(E, w, D), tensor(n, w), tensor(n, F), integers(n), *table),
                   {"D": D, "F": F, "SWIGLU": swiglu, "SAVE": True, **m}, True)
            for has_dact in (False,) if quick else (False, True):
                yield (f"act_backward ({name}{', dact' * has_dact})", tk.act_backward_kernel,
                       (tensor(T, D), tensor(E, D, F), tensor(n, w), tensor(n, w), tensor(n, F),
                        tensor(96, n, dtype=torch.float32), tensor(n), tensor(n, F),
                        integers(n), integers(n), *table, n),
                       {"D": D, "F": F, "SWIGLU": swiglu, "HAS_DACT": has_dact, **m}, True)
            yield (f"down ({name})", tk.down_kernel,
                   (tensor(n, F), tensor(E, D, F), tensor(n, D), tensor(n), integers(n), *table),
                   {"IN": F, "OUT": D, "STRIDE_IN": 1, "STRIDE_OUT": F, "GATED": True, **m}, True)
            yield (f"down, as dx ({name})", tk.down_kernel,
                   (tensor(n, w), tensor(E, w, D), tensor(n, D), tensor(n), integers(n), *table),
                   {"IN": w, "OUT": D, "STRIDE_IN": D, "STRIDE_OUT": 1, "GATED": False, **m}, True)
        m = {"BLOCK_M": largest, **precision}
        yield (f"weight_grad, of w_in ({act})", tk.weight_grad_kernel,
               (tensor(n, w), tensor(T, D), tensor(E, w, D), integers(n), integers(E)),
               {"OUT": w, "IN": D, "GATHER_GRAD": False, "GATHER_A": True, **m}, True)
        if swiglu:
            yield ("weight_grad, of w_out", tk.weight_grad_kernel,
                   (tensor(T, D), tensor(n, F), tensor(E, D, F), integers(n), integers(E)),
                   {"OUT": D, "IN": F, "GATHER_GRAD": True, "GATHER_A": False, **m}, True)
        w, scores = 2 * WIDE if swiglu else WIDE, tensor(T, K, WIDE)
        pairs, low = tensor(T, K, dtype=torch.float32), 16 if dtype == torch.bfloat16 else 0
        yield (f"mask ({act})", tk.mask_kernel,
               (scores, tensor(T, w), tensor(T, WIDE), pairs, integers(T, K), 1536, K),
               {"F": WIDE, "ACTIVATION": act, "LOW": low, "BLOCK": 8192, "num_warps": 8}, False)
        yield (f"mask_backward ({act})", tk.mask_backward_kernel,
               (tensor(T, WIDE), tensor(T, w), scores, pairs, integers(T, K),
                tensor(T, WIDE), tensor(T, w), K),
               {"F": WIDE, "SWIGLU": swiglu, "BLOCK": 1024}, False)
        yield (f"decode ({act})", tk.decode_kernel,
               (tensor(1, D), tensor(1, WIDE, dtype=torch.float32), tensor(w, D), tensor(WIDE, D),
                tensor(1, 768, D, dtype=torch.float32)),
               {"D": D, "F": WIDE, "SWIGLU": swiglu, "BLOCK": 8, "BLOCK_D": 1024, "num_warps": 8},
               False)


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


def compile_all(quick):
    """A dict per kernel, dtype, architecture and configuration. quick: bfloat16, swiglu and, as on
    sm_120, whose autotuner leaves out what does not fit, the first configuration."""
    import triton
    driver = StandIn()
    triton.runtime.driver.set_active(driver)
    rows = []
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        for name, kernel, arguments, constants, is_gemm in cases(dtype, quick):
            for driver.architecture in SHARED_LIMIT:
                tuned = hasattr(kernel, "prune_configs")
                if tuned:
                    kernel.nargs = dict(zip(kernel.arg_names, arguments))
                configs = kernel.prune_configs(constants) if tuned else [None]
                for config in configs[:1] if quick or driver.architecture == 120 else configs:
                    options = constants | config.all_kwargs() if tuned else constants
                    compiled = (kernel.fn if tuned else kernel).warmup(
                        *arguments, grid=(1,), **options)
                    registers, spilled = resources(compiled.asm["cubin"])
                    tiles = {k: v for k, v in options.items() if k.startswith("BLOCK")}
                    rows.append(dict(
                        kernel=name, dtype=str(dtype)[6:], sm=driver.architecture, tiles=tiles,
                        warps=compiled.metadata.num_warps,
                        stages=compiled.metadata.num_stages if is_gemm else None,
                        registers=registers, spilled_bytes=spilled,
                        shared_bytes=compiled.metadata.shared, is_gemm=is_gemm,
                        wgmma=compiled.asm["ptx"].count("wgmma.mma_async")))
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def write_results(rows, folder):
    import triton
    record = dict(
        command="python tests/test_compile.py", torch=torch.__version__, triton=triton.__version__,
        shared_limit=SHARED_LIMIT, shapes=dict(D=D, F=F, E=E, T=T, K=K, masked_F=WIDE), rows=[])
    row_lines = ",\n".join(map(json.dumps, rows))
    text = json.dumps(record)[:-2] + "\n" + row_lines + "\n]}\n"
    (folder / "compile.json").write_text(text)
    limits = ", ".join(f"{limit:,} bytes on sm_{sm}" for sm, limit in SHARED_LIMIT.items())
    lines = ["# The Triton kernels, compiled without a GPU", "",
             f"`python tests/test_compile.py` with triton {triton.__version__} wrote this file and "
             f"compile.json. Shapes: D = {D}, F = {F}, E = {E}; masked FFN: F = {WIDE}.",
             f"Shared memory a program may have: {limits}.",
             "Spilled: bytes of local memory a thread, 0 wanted. wgmma: instructions in the PTX "
             "(sm_90, 16-bit products).", "",
             "| kernel | dtype | sm | tiles | warps | stages | registers | spilled | shared bytes "
             "| wgmma |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        tiles = " ".join(f"{k[6:] or 'F'}={v}" for k, v in r["tiles"].items())
        cells = (r["kernel"], r["dtype"], r["sm"], tiles, r["warps"], r["stages"] or "-",
                 r["registers"], r["spilled_bytes"], f"{r['shared_bytes']:,}", r["wgmma"] or "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (folder / "compile.md").write_text("\n".join(lines) + "\n")


def check(rows):
    for r in rows:
        assert r["shared_bytes"] <= SHARED_LIMIT[r["sm"]], r
        assert r["spilled_bytes"] == 0, r
        if r["is_gemm"] and r["sm"] == 90 and r["dtype"] != "float32":
            assert r["wgmma"] > 0 or r["tiles"]["BLOCK_M"] < 64, r


def run(*options):
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *options]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_kernel_compiles_as_it_is_used_most():
    rows = run("--quick")
    names = {r["kernel"].split(" ")[0].rstrip(",") for r in rows}
    assert names == {"up", "down", "act_backward", "weight_grad", "mask", "mask_backward", "decode"}
    assert {r["sm"] for r in rows} == {80, 90, 120}
    check(rows)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_configuration_compiles(tmp_path):
    rows = run(f"--out={tmp_path}")
    check(rows)
    assert len(rows) > 100 and (tmp_path / "compile.md").read_text().count("\n| ") > len(rows)
    assert json.loads((tmp_path / "compile.json").read_text())["rows"] == rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="each kernel's first configuration in bfloat16; writes nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "results",
                        help="folder for compile.json and compile.md")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["TRITON_INTERPRET"] = "0"
    found = compile_all(options.quick)
    if not options.quick:
        write_results(found, options.out)
    check(found)
