"""How fast is each op on real layers, against the best dense torch path? A JSON file, a plot and a table.

    python bench/bench_ops.py --json bench/results/ops.json [--quick] [--budget MINUTES]

Dense and sparse are timed in turn, A B A B, by vpns_kernels.measure: pytest-benchmark times one callable
after the other and cannot interleave, so a disturbance of the machine would count for one side alone. The
whole grid takes hours: with a budget, what matters most is measured first, and the report says what was left
out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where this file is run and not imported

from bench.plot import plot_speedups  # noqa: E402
from bench.targets import GOAL_BATCH, LEAST_ROUNDS, targets  # noqa: E402
from vpns_kernels.measure.fingerprint import fingerprint  # noqa: E402
from vpns_kernels.measure.layer_bench import (  # noqa: E402
    Variant,
    bench_layer,
    bench_selection,
    measure_ceilings,
    measure_copy_gb_per_s,
    roofline,
)
from vpns_kernels.measure.layers import Layer, read_layers  # noqa: E402
from vpns_kernels.measure.timing import measurement_lock  # noqa: E402
from vpns_kernels.memory import keep_freed_memory  # noqa: E402
from vpns_kernels.patterns import parse_pattern  # noqa: E402

LISTS = ROOT / "bench" / "layers"
PATTERNS = "unstructured,block:16x16,block:32x32,channel"
# Both dtypes that torch computes in; its compiler is asked for by name.
OPPONENTS = "torch float32,torch bfloat16"
# What is measured first where the budget does not reach: the sum of these ranks, else the order of the lists.
DENSITY_RANK = {0.1: 0, 0.2: 1, 0.05: 1, 0.5: 3, 0.02: 3, 1.0: 4}
BATCH_RANK = {GOAL_BATCH: 0, 1: 2, 32: 3}
NETWORK_RANK = {"resnet18": 0, "resnet50": 2, "vgg16": 4}
FILTER_RANK = {(3, 3): 0, (1, 1): 1}


@dataclass(frozen=True)
class Cell:
    """All variants of a layer at one batch and density: they take turns with dense."""

    network: str
    layer: Layer
    batch: int
    density: float

    @property
    def name(self) -> str:
        return f"{self.network} {self.layer.name} batch {self.batch} density {self.density:g}"

    @property
    def rank(self) -> int:
        """Small is important."""
        filters = FILTER_RANK.get(self.layer.geometry.kernel_size, 2)
        others = DENSITY_RANK.get(self.density, 4) + BATCH_RANK.get(self.batch, 4)
        return others + NETWORK_RANK.get(self.network, 4) + filters


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    cells = sorted(grid(options), key=lambda cell: cell.rank)
    rows: list[dict[str, Any]] = []
    stop_at = time.monotonic() + 60 * options.budget
    # As vpns does; torch's layers gain by it too.
    options.keeps_freed_memory = keep_freed_memory()
    with measurement_lock():
        ceilings, copy_gb_per_s = measure_ceilings(), measure_copy_gb_per_s()
        left_out = []
        for cell in cells:
            if time.monotonic() > stop_at:
                left_out.append(cell.name)
                continue
            print(cell.name, file=sys.stderr, flush=True)
            rows += bench_cell(cell, options)
        for row in rows:
            row["roofline"] = roofline(row, ceilings, copy_gb_per_s)
        report = {
            "schema_version": 2,
            "fingerprint": fingerprint(),
            "settings": vars(options) | {"json": str(options.json)},
            "sparseprop": "installed" if find_spec("sparseprop") else "not installed",
            "ceilings_gflops": ceilings,
            "ceilings_gflops_per_core": {k: v / torch.get_num_threads() for k, v in ceilings.items()},
            "copy_gb_per_s": copy_gb_per_s,
            "rows": rows,
            "left_out": left_out,
            "selection": bench_selection(read_layers(LISTS / "resnet18.txt"), 0.1, min(options.rounds, 10)),
            "targets": targets(rows),
        }
    write_json(options.json, report)
    plot_speedups(rows, options.json.with_suffix(".svg"))
    print(table(report))


def grid(options: argparse.Namespace) -> list[Cell]:
    """Every layer of the lists at every batch and density."""
    found = []
    for network in options.layers:
        for layer in read_layers(LISTS / f"{network}.txt"):
            if options.quick and not is_3x3(layer):
                continue
            found += [Cell(network, layer, b, d) for b in options.batches for d in options.densities]
    return found


def bench_cell(cell: Cell, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every pattern and dtype, by the best sparse kernel and as a layer chooses by itself."""
    variants = [
        Variant(parse_pattern(spec), cell.density, getattr(torch, dtype), seed, kernel)
        for spec in options.patterns
        for dtype in options.dtypes
        for seed in options.seeds
        for kernel in options.kernels
    ]
    found = bench_layer(cell.layer, cell.batch, variants, options.opponents, options.rounds)
    return [{"network": cell.network} | row | {"packed_ms": packed_ms(row)} for row in found]


def packed_ms(row: dict[str, Any]) -> float | None:
    """The time without conversion at the door: the whole by the share of the products in what was counted."""
    phases = row["phases_ms"]
    if phases is None:
        return None
    share: float = phases["products"] / sum(phases.values())
    whole: float = row["sparse"]["median_ms"]
    return whole * share


def table(report: dict[str, Any]) -> str:
    """The report for people, in markdown."""
    engines = list(report["rows"][0]["dense"]) if report["rows"] else []
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "network": lambda row: row["network"],
        "layer": lambda row: row["layer"],
        "batch": lambda row: str(row["batch"]),
        "pattern": lambda row: row["pattern"],
        "density": lambda row: f"{row['density']:g}",
        "dtype": lambda row: row["dtype"],
        "kernel": lambda row: ("auto: " if row["asked"] == "auto" else "") + row["kernel"],
        "sparse ms (p20-p80)": lambda row: _spread(row["sparse"]),
        "packed ms": lambda row: "-" if row["packed_ms"] is None else f"{row['packed_ms']:.3g}",
    }
    columns |= {f"{name} ms": lambda row, name=name: _engine_ms(row, name) for name in engines}  # type: ignore[misc]
    columns |= {
        "speed-up (95 %)": lambda row: _interval(row["ratios"][row["best_dense"]]),
        "dense-equivalent GFLOP/s": lambda row: f"{row['gflops_dense_equivalent']:.0f}",
        "effective": lambda row: f"{row['gflops_effective']:.0f}",
        "of roofline": lambda row: f"{row['roofline']['share']:.0%} ({row['roofline']['bound_by']})",
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in report["rows"]]
    selection = report["selection"]
    ours, published = (selection[name]["median_ms"] for name in ("select_threshold", "torch.kthvalue"))
    lines += [
        "",
        f"select_threshold, {selection['scores']:,} scores: {ours:.1f} ms, torch.kthvalue {published:.1f} ms",
    ]
    for target in report["targets"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        packed = f", packed {target['packed']:.2f}" if target["packed"] is not None else ""
        form = f" ({target['form']})" if target["form"] is not None else ""
        verdict = "met" if target["met"] else "MISSED"
        lines.append(f"{verdict}: {target['name']}: {value}{packed}{form}, wanted {target['wanted']}")
    if report["left_out"]:
        lines.append(
            f"left out for want of time: {len(report['left_out'])} cells, {report['left_out'][0]} first"
        )
    return "\n".join(lines)


def _spread(sample: dict[str, float]) -> str:
    return f"{sample['median_ms']:.3g} ({sample['p20_ms']:.3g}-{sample['p80_ms']:.3g})"


def _engine_ms(row: dict[str, Any], name: str) -> str:
    return f"{row['dense'][name]['median_ms']:.3g}" if name in row["dense"] else "-"


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"


def is_3x3(layer: Layer) -> bool:
    """The layers that the targets are about."""
    return layer.geometry.kernel_size == (3, 3)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="what the targets are about: under 3 minutes")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="MINUTES", help="of measuring")
    parser.add_argument("--layers", type=words, help=f"lists of {LISTS}")
    parser.add_argument("--patterns", type=words, default=words(PATTERNS))
    parser.add_argument("--densities", type=numbers(float))
    parser.add_argument("--batches", type=numbers(int))
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--kernels", type=words, default=["sparse", "auto"], help="or names of kernels")
    parser.add_argument("--seeds", type=numbers(int), default=[0], help="of the random masks")
    parser.add_argument("--opponents", type=words, default=words(OPPONENTS), help="dense engines")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS + 1, help="how often each is timed")
    options = parser.parse_args(arguments)
    # The quick grid is what the targets read; the whole one is for a budget.
    options.layers = options.layers or (["resnet18"] if options.quick else list(NETWORK_RANK))
    options.densities = options.densities or ([0.2, 0.1, 0.05] if options.quick else list(DENSITY_RANK))
    options.batches = options.batches or ([GOAL_BATCH] if options.quick else list(BATCH_RANK))
    for name in options.layers:
        if not (LISTS / f"{name}.txt").exists():
            parser.error(
                f"--layers: expected some of {sorted(p.stem for p in LISTS.glob('*.txt'))}, got {name!r}"
            )
    if unknown := set(options.dtypes) - {"float32", "bfloat16", "float16"}:
        parser.error(f"--dtypes: expected float32, bfloat16 and float16, got {sorted(unknown)}")
    return options


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        return [kind(word) for word in words(text)]

    return parse


if __name__ == "__main__":
    main()
