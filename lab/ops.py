"""Where a training step of a tiny model goes, operation by operation: results/ops.md.

    python -m lab.ops          # minutes on quiet cores: dense, vanilla, UniPool, infmoe
"""
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lab.bench import describe, training_step
from lab.reproduce import configs_of, settings_of

STEPS, SHOWN = 5, 14
RUNS = ("dense", "vanilla", "unipool", "infmoe")


def measure(name):
    """A run of lab.reproduce's cpu size -> rows (operation, calls a step, its own ms a step), the
    most expensive first"""
    model_config, config = configs_of(settings_of("cpu", name, 1e-3)[0])
    step = training_step(model_config, "cpu", config.micro_batch, compiled=False)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            step()
    rows = [(event.key, event.count / STEPS, event.self_cpu_time_total / 1e3 / STEPS)
            for event in recorded.key_averages()]
    return sorted(rows, key=lambda row: -row[2])


def page(measured):
    """{run: rows} -> the text of the page"""
    lines = [
        "# Operations of a training step, tiny models", "",
        f"`python -m lab.ops` on {describe('cpu')}, torch {torch.__version__}: 8 LLaMA blocks of",
        "width 64, 2,048 tokens a step, fp32, eager, clipping and AdamW included.",
        "Milliseconds are each operation's own, under the profiler, which adds some to each call.",
        "", "| run | operations a step | ms a step | of dense |", "|---|---|---|---|"]
    totals = {name: (sum(r[1] for r in rows), sum(r[2] for r in rows))
              for name, rows in measured.items()}
    for name, (calls, ms) in totals.items():
        lines.append(f"| {name} | {calls:,.0f} | {ms:.0f} | {ms / totals['dense'][1]:.2f} |")
    for name, rows in measured.items():
        lines += ["", f"## {name}", "", "| operation | calls | ms | share |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {calls:.0f} | {ms:.1f} | {ms / totals[name][1]:.1%} |"
                  for key, calls, ms in rows[:SHOWN]]
    return "\n".join(lines) + "\n"


def main():
    torch.set_num_threads(1)
    Path("results/ops.md").write_text(page({name: measure(name) for name in RUNS}))
    print("results/ops.md")


if __name__ == "__main__":
    main()
