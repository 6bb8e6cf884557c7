"""How fast is each op on real layers, against the best dense torch path? A JSON file and a table.

    python bench/bench_ops.py --json bench/results/ops.json [--quick] [--layers resnet18,resnet50]

Dense and sparse are timed in turn, A B A B, by vpns_kernels.measure: pytest-benchmark times one callable
after the other and cannot interleave, so a disturbance of the machine would count for one side alone
(test_ops_benchmark.py still offers every op's cases to it).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from vpns_kernels.measure.fingerprint import fingerprint
from vpns_kernels.measure.layer_bench import Variant, bench_layer, bench_selection, measure_ceilings
from vpns_kernels.measure.layers import Layer, read_layers
from vpns_kernels.measure.timing import measurement_lock
from vpns_kernels.patterns import parse_pattern

LISTS = Path(__file__).resolve().parent / "layers"
# Both dtypes that torch computes in; its compiler is asked for by name.
OPPONENTS = "torch float32,torch bfloat16"
# What decides, on ResNet-18's 3×3 layers, batch 16: pattern, dtypes that count, opponent. On a CPU
# without bf16 instructions torch's bf16 is no opponent, so the fastest of all stands beside it.
GOALS = (
    ("block", ("float32", "bfloat16"), "torch bfloat16"),
    ("block", ("float32", "bfloat16"), "best dense"),
    ("unstructured", ("float32",), "torch float32"),
)
GOAL_DENSITY, GOAL_BATCH = 0.1, 16


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    layers = {name: read_layers(LISTS / f"{name}.txt") for name in options.layers}
    if options.quick:
        layers = {name: [layer for layer in found if is_3x3(layer)] for name, found in layers.items()}
    with measurement_lock():
        rows = []
        for name, found in layers.items():
            for layer in found:
                rows += bench_one(name, layer, options)
        ceilings = measure_ceilings()
        for row in rows:
            ceiling = ceilings["bfloat16" if "amx" in row["kernel"] else "float32"]
            row["ceiling_share"] = row["gflops_effective"] / ceiling
        report = {
            "schema_version": 1,
            "fingerprint": fingerprint(),
            "settings": vars(options) | {"json": str(options.json)},
            "ceilings_gflops": ceilings,
            "ceilings_gflops_per_core": {k: v / torch.get_num_threads() for k, v in ceilings.items()},
            "rows": rows,
            "selection": bench_selection(read_layers(LISTS / "resnet18.txt"), 0.1, min(options.rounds, 10)),
            "targets": targets(rows),
        }
    write_json(options.json, report)
    print(table(report))


def bench_one(network: str, layer: Layer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants of a layer; those of one density take turns with dense."""
    rows = []
    for batch in options.batches:
        for density in options.densities:
            variants = [
                Variant(parse_pattern(spec), density, getattr(torch, dtype), seed)
                for spec in options.patterns
                for dtype in options.dtypes
                for seed in options.seeds
            ]
            print(f"{network} {layer.name} batch {batch} density {density:g}", file=sys.stderr, flush=True)
            found = bench_layer(layer, batch, variants, options.opponents, options.rounds)
            rows += [{"network": network} | row for row in found]
    return rows


def targets(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and least ratio over ResNet-18's 3×3 layers, of the pattern and dtype that is best over all."""
    rows = [r for r in rows if r["network"] == "resnet18" and r["kernel_size"] == [3, 3]]
    rows = [r for r in rows if r["density"] == GOAL_DENSITY and r["batch"] == GOAL_BATCH]
    found = []
    for pattern, dtypes, opponent in GOALS:
        by_form: dict[str, list[float]] = {}
        for row in rows:
            against = row["best_dense"] if opponent == "best dense" else opponent
            if (
                row["pattern"].split(":")[0] == pattern
                and row["dtype"] in dtypes
                and against in row["ratios"]
            ):
                form = f"{row['pattern']} {row['dtype']}"
                by_form.setdefault(form, []).append(row["ratios"][against]["median"])
        best = max(by_form, key=lambda form: geometric_mean(by_form[form]), default=None)
        for what, value_of in (("geometric mean", geometric_mean), ("minimum", min)):
            value = None if best is None else value_of(by_form[best])
            name = f"{pattern} at density 0.1 against {opponent}, ResNet-18's 3x3 layers, batch 16: {what}"
            is_met = value is not None and value > 1
            found.append({"name": name, "form": best, "value": value, "wanted": "> 1", "met": is_met})
    return found


def table(report: dict[str, Any]) -> str:
    """The report for people, in markdown."""
    engines = list(report["rows"][0]["dense"]) if report["rows"] else []
    head = ["network", "layer", "batch", "pattern", "density", "dtype", "kernel", "sparse ms (p20-p80)"]
    head += [f"{name} ms" for name in engines]
    head += ["speed-up (95 %)", "dense-equivalent GFLOP/s", "effective", "of ceiling"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        best, sparse = row["ratios"][row["best_dense"]], row["sparse"]
        cells = [
            row["network"],
            row["layer"],
            row["batch"],
            row["pattern"],
            f"{row['density']:g}",
            row["dtype"],
        ]
        cells += [row["kernel"], f"{sparse['median_ms']:.3g} ({sparse['p20_ms']:.3g}-{sparse['p80_ms']:.3g})"]
        cells += [f"{row['dense'][name]['median_ms']:.3g}" for name in engines]
        cells += [f"{best['median']:.2f}x ({best['low']:.2f}-{best['high']:.2f})"]
        cells += [f"{row['gflops_dense_equivalent']:.0f}", f"{row['gflops_effective']:.0f}"]
        cells += [f"{row['ceiling_share']:.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    selection = report["selection"]
    ours, published = (selection[name]["median_ms"] for name in ("select_threshold", "torch.kthvalue"))
    lines += [
        "",
        f"select_threshold, {selection['scores']:,} scores: {ours:.1f} ms, torch.kthvalue {published:.1f} ms",
    ]
    for target in report["targets"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f} ({target['form']})"
        lines.append(
            f"{'met' if target['met'] else 'MISSED'}: {target['name']}: {value}, wanted {target['wanted']}"
        )
    return "\n".join(lines)


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
    parser.add_argument("--quick", action="store_true", help="3x3 layers at density 0.1 with few rounds")
    parser.add_argument("--layers", type=words, default=["resnet18"], help=f"lists of {LISTS}")
    parser.add_argument("--patterns", type=words, default=words("unstructured,block:16x16,block:32x32"))
    parser.add_argument("--densities", type=numbers(float), default=[0.2, 0.1, 0.05])
    parser.add_argument("--batches", type=numbers(int), default=[GOAL_BATCH])
    parser.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    parser.add_argument("--seeds", type=numbers(int), default=[0], help="of the random masks")
    parser.add_argument("--opponents", type=words, default=words(OPPONENTS), help="dense engines")
    parser.add_argument("--rounds", type=int, default=31, help="how often each is timed")
    options = parser.parse_args(arguments)
    for name in options.layers:
        if not (LISTS / f"{name}.txt").exists():
            parser.error(
                f"--layers: expected some of {sorted(p.stem for p in LISTS.glob('*.txt'))}, got {name!r}"
            )
    if unknown := set(options.dtypes) - {"float32", "bfloat16"}:
        parser.error(f"--dtypes: expected float32 and bfloat16, got {sorted(unknown)}")
    if options.quick:
        options.densities, options.rounds = [GOAL_DENSITY], min(options.rounds, 5)
    return options


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        return [kind(word) for word in words(text)]

    return parse


if __name__ == "__main__":
    main()
