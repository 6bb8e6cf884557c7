"""What do our kernels reach on this GPU? Parts of one report, each bounded in time, and a short table.

    python -m bench.bench_gpu PART ... --json gpu.json [--budget SECONDS]    PART: ops layers steps, a network
    python -m bench.bench_gpu table --json gpu.json

A part that is measured again replaces what the report held of it. Ceilings are measured with each part, and
opponents take turns with ours. Without a GPU it says so and ends with 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where this file is run and not imported

from bench.bench_ops import LISTS, is_3x3, write_json  # noqa: E402
from bench.gpu_layers import bench_gpu_layer  # noqa: E402
from bench.gpu_networks import DenseNetwork, bench_gpu_network, make_dense  # noqa: E402
from bench.gpu_ops import bench_gpu_batch_norm, bench_gpu_prompt, bench_gpu_selection  # noqa: E402
from bench.gpu_report import finish_row, latest, merge, table  # noqa: E402
from bench.gpu_targets import (  # noqa: E402
    BATCH,
    CHANNELS,
    LEAST_CHANNELS,
    NETWORKS,
    PATTERN,
    STEP_BATCH,
)
from bench.train_loops import Arm, Cell, Sizes  # noqa: E402
from bench.train_steps import bench_iterations  # noqa: E402
from vpns_kernels.measure.gpu import gpu_fingerprint, measure_gpu_ceilings  # noqa: E402
from vpns_kernels.measure.layers import Layer, read_layers  # noqa: E402
from vpns_kernels.measure.timing import measurement_lock  # noqa: E402

PARTS = ("ops", "layers", "steps", *NETWORKS)
DENSITIES = (0.1, 0.2, 0.05)
ROUNDS = 11
# How jobs end that wait for torch's compiler, and what they need at least; of the others nothing is known.
_COMPILED, _COMPILER_S = " autotuned", 90.0
Row = dict[str, Any]
Job = tuple[str, Callable[[], list[Row]]]


def plan_ops(device: torch.device) -> list[Job]:
    """Selection over ResNet-50's scores, the prompted stem, batch norm."""
    layers = read_layers(LISTS / "resnet50.txt")
    stem = layers[0].geometry
    backends = ("triton", "cuda")
    jobs: list[Job] = [
        (f"select_threshold {name}", partial(bench_gpu_selection, layers, 0.1, device, ROUNDS, [name]))
        for name in backends
    ]
    jobs += [
        (
            f"prompt_conv2d {variant}",
            lambda variant=variant: [bench_gpu_prompt(stem, variant, BATCH, 224, 16, device, ROUNDS)],  # type: ignore[misc]
        )
        for variant in ("framed", "released")
    ]
    jobs += [
        (
            f"batch_norm_act {channels} at {size}",
            lambda channels=channels, size=size: [  # type: ignore[misc]
                bench_gpu_batch_norm(channels, size, BATCH, device, ROUNDS)
            ],
        )
        for channels, size in ((64, 56), (256, 56), (512, 7))
    ]
    return jobs


def plan_layers(device: torch.device) -> list[Job]:
    """3x3 layers with many channels, which goals are about, by blocks and by channels; 1x1 layers, the rest.

    Channels run by the kernel that gathers them and by cuDNN after a gather; the compiler comes last.
    """
    found = {name: read_layers(LISTS / f"{name}.txt") for name in ("resnet18", "resnet50", "vgg16")}
    distinct: dict[tuple[Any, ...], tuple[str, Layer]] = {}
    for network, layers in found.items():
        for layer in layers:
            if not layer.is_linear and layer.geometry.in_channels >= 64:
                key = (layer.geometry, layer.height)
                distinct.setdefault(key, (network, layer))
    ranked = sorted(distinct.values(), key=lambda entry: _rank(entry[1]))

    def job(
        network: str, layer: Layer, densities: Sequence[float], pattern: str = PATTERN, **options: Any
    ) -> Job:
        def measure() -> list[Row]:
            rows = bench_gpu_layer(layer, BATCH, pattern, densities, device, ROUNDS, **options)
            return [{"network": network} | row for row in rows]

        return f"{network} {layer.name}", measure

    judged = [entry for entry in ranked if _rank(entry[1]) == 0]
    goals = [job(network, layer, DENSITIES) for network, layer in judged]
    rest = ranked[len(judged) :]
    others = [job(network, layer, DENSITIES[:1]) for network, layer in rest]
    search = [job(network, layer, DENSITIES[:1], stage="search") for network, layer in judged]

    def channels(entries: Sequence[tuple[str, Layer]]) -> list[Job]:
        found = []
        for network, layer in entries:
            for backend in ("triton", "compact"):
                name, measure = job(network, layer, DENSITIES[:1], "channel", backend=backend)
                found.append((f"{name} channel {backend}", measure))
        return found

    autotuned = [job(network, layer, DENSITIES, is_autotuned=True) for network, layer in judged]
    last = ((f"{name}{_COMPILED}", measure) for name, measure in autotuned)
    searched = ((f"{name} search", measure) for name, measure in search)
    return [*goals, *searched, *channels(judged), *others, *channels(rest), *last]


def _rank(layer: Layer) -> int:
    if is_3x3(layer) and layer.geometry.in_channels >= LEAST_CHANNELS:
        return 0 if layer.geometry.stride == (1, 1) else 1
    return 2 if layer.geometry.kernel_size == (1, 1) else 3


def plan_steps(device: torch.device) -> list[Job]:
    """One iteration of tuning and of search, ResNet-50, against the published scheme in torch."""
    sizes = Sizes("resnet50", device=str(device))
    arms = [Arm("torch", "bfloat16", 0.1), Arm("ours", "bfloat16", 0.1, PATTERN)]
    return [
        (
            f"{stage} framed",
            partial(bench_iterations, Cell(stage, "framed", STEP_BATCH), arms, sizes, ROUNDS // 2),
        )
        for stage in ("tune", "search")
    ]


def plan_network(model: str, device: torch.device) -> list[Job]:
    """A network: all that goals name against torch, a tenth of its blocks first; then its compiler."""
    from vpns_kernels.torchvision_import import import_torchvision

    forms = [(PATTERN, density) for density in DENSITIES]
    if model == "resnet50":
        forms += [("channel", density) for density in CHANNELS]

    @cache
    def dense(is_autotuned: bool) -> DenseNetwork:
        torch.manual_seed(0)
        network = import_torchvision("models").get_model(model, weights=None)
        x = torch.randn(BATCH, 3, 224, 224, device=device)
        return make_dense(model, network, x, is_autotuned)

    def job(form: tuple[str, float], is_autotuned: bool) -> Job:
        name = f"{form[0]} {form[1]:g}{_COMPILED if is_autotuned else ''}"
        return name, lambda: [bench_gpu_network(dense(is_autotuned), form, ROUNDS)]

    return [job(form, is_autotuned) for is_autotuned in (False, True) for form in forms]


def plan(part: str, device: torch.device) -> list[Job]:
    """What a part measures, the most important first."""
    plans = {"ops": plan_ops, "layers": plan_layers, "steps": plan_steps}
    return plans[part](device) if part in plans else plan_network(part, device)


def measure_part(
    jobs: Sequence[Job], device: torch.device, budget_s: float, save: Callable[[Row], object]
) -> None:
    """The rows of all jobs that are begun in time; one that stops says why, and the next goes on.

    Args:
        save: is given what is known after each job, so that it survives what stops a later one.
    """
    stop_at = time.monotonic() + budget_s
    with measurement_lock():
        fingerprint, ceilings = gpu_fingerprint(device), measure_gpu_ceilings(device)
        rows: list[Row] = []
        found: Row = {"fingerprint": fingerprint, "ceilings": ceilings, "left_out": [], "stopped": {}}
        for name, measure in jobs:
            if time.monotonic() + (_COMPILER_S if name.endswith(_COMPILED) else 0) > stop_at:
                found["left_out"].append(name)
                continue
            print(name, file=sys.stderr, flush=True)
            try:
                measured = measure()
            # Triton's and its descriptors' errors, too, have nothing in common.
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                found["stopped"][name] = why
                print(f"{name}: {why}", file=sys.stderr, flush=True)
                measured = []
            for row in measured:
                finish_row(row, ceilings)
            rows += measured
            save(found | {"rows": latest(rows)})
        save(found | {"rows": latest(rows)})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "table"))
    parser.add_argument("--json", type=Path, required=True, help="the report, which parts are added to")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of each part")
    options = parser.parse_args(arguments)
    report = json.loads(options.json.read_text()) if options.json.exists() else {"parts": {}}
    measured = [part for part in options.parts if part != "table"]
    if measured and not torch.cuda.is_available():
        print("bench_gpu: expected a GPU, got none (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    for part in measured:
        device = torch.device("cuda", torch.cuda.current_device())

        def save(found: Row, part: str = part) -> None:
            nonlocal report
            report = merge(report, {part: found})
            write_json(options.json, report)

        measure_part(plan(part, device), device, options.budget, save)
    if "table" in options.parts:
        print(table(merge(report, {})))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
