"""What does each prompt cost? Time, memory and entries of one pass through prompt and first convolution.

    python -m bench.bench_prompts --json bench/results/prompts.json [--batch N] [--rounds N]

A row is a kind of prompt before ResNet-18's first convolution at 224 pixels: forward, and the gradients of
the prompt and of the scores, as an update of search computes them. The prompts are timed in turn, A B A B;
each one's memory is the most that a process of its own has resident above what it had before the first pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where this file is run and not imported

from bench.bench_ops import write_json  # noqa: E402
from bench.train_memory import peak_mb, status_mb  # noqa: E402
from vpns.accelerate import fuse_predictor  # noqa: E402
from vpns.config import PromptConfig  # noqa: E402
from vpns.predictor import Predictor  # noqa: E402
from vpns.prompt import build_prompt  # noqa: E402
from vpns_kernels import parse_pattern  # noqa: E402
from vpns_kernels.convert import mask_layers  # noqa: E402
from vpns_kernels.measure.fingerprint import fingerprint  # noqa: E402
from vpns_kernels.measure.timing import interleave, measurement_lock  # noqa: E402
from vpns_kernels.memory import keep_freed_memory  # noqa: E402

CANVAS, FRAME, BATCH, ROUNDS = 224, 16, 32, 30
PROMPTS = {
    "none": PromptConfig(kind="none", canvas=CANVAS, frame=FRAME),
    "pad, framed": PromptConfig(canvas=CANVAS, frame=FRAME),
    "pad, released": PromptConfig(variant="released", canvas=CANVAS, frame=FRAME),
    "expand": PromptConfig(kind="expand", canvas=CANVAS, frame=FRAME),
    "fix": PromptConfig(kind="fix", canvas=CANVAS, frame=FRAME),
    "random": PromptConfig(kind="random", canvas=CANVAS, frame=FRAME),
}


def make_pass(config: PromptConfig, batch: int) -> tuple[Callable[[], object], dict[str, Any]]:
    """One pass, and what is known of the prompt without timing it."""
    torch.manual_seed(0)
    prompt = build_prompt(config)
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False)).requires_grad_(False)
    predictor, done = fuse_predictor(Predictor(prompt, mask_layers(stem, parse_pattern("unstructured"))))
    images = torch.rand(batch, 3, prompt.image_size, prompt.image_size)
    grad: Tensor | None = None

    def run() -> None:
        nonlocal grad
        predictor.zero_grad(set_to_none=True)
        y = predictor(images, True)
        grad = torch.ones_like(y) if grad is None else grad
        y.backward(grad)

    is_fused = done["prompted_stem"] == "fused"
    return run, {"entries": prompt.learned, "image_size": prompt.image_size, "fused": is_fused}


def measure_memory(name: str, batch: int) -> float:
    """Megabytes that three passes add to this process."""
    keep_freed_memory()  # as vpns does
    run, _ = make_pass(PROMPTS[name], batch)
    before = status_mb("VmRSS")
    for _ in range(3):
        run()
    return peak_mb() - before


def bench(batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row per prompt."""
    keep_freed_memory()
    made = {name: make_pass(config, batch) for name, config in PROMPTS.items()}
    with measurement_lock():
        samples = interleave({name: run for name, (run, _) in made.items()}, rounds)
    rows = []
    for name, (_, facts) in made.items():
        command = [sys.executable, "-m", "bench.bench_prompts", "--memory-of", name, "--batch", str(batch)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        row = {"prompt": name, "batch": batch, "canvas": CANVAS, "frame": FRAME} | facts
        rows.append(row | samples[name].to_dict() | {"added_mb": float(done.stdout)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory-of", choices=PROMPTS, help="print one prompt's memory, and nothing else")
    asked = parser.parse_args(arguments)
    if asked.memory_of:
        print(measure_memory(asked.memory_of, asked.batch))
        return
    rows = bench(asked.batch, asked.rounds)
    print(table(rows))
    if asked.json is not None:
        write_json(asked.json, {"schema_version": 1, "fingerprint": fingerprint(), "rows": rows})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| prompt | ms | MB added | entries | image | in one kernel |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['prompt']} | {row['median_ms']:.1f} | {row['added_mb']:.0f} | {row['entries']:,} | "
        f"{row['image_size']} | {'yes' if row['fused'] else 'no'} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
