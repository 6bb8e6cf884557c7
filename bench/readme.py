"""Where do the README's numbers come from? From the JSON files in bench/results, by this script alone.

python bench/readme.py           rewrite the README's table
python bench/readme.py --check   exit 1 where the README says something else
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DENSITIES = (0.2, 0.1, 0.05)
# Pixels and batch of the training that is shown, and its density.
TRAINED, TRAINED_DENSITY = (224, 32), 0.1
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
SPEED, ACCURACY = (
    ("<!-- speed:begin -->", "<!-- speed:end -->"),
    ("<!-- accuracy:begin -->", "<!-- accuracy:end -->"),
)
EXPERIMENTS = ("arms", "exp1", "exp2", "exp3")


def main(arguments: Sequence[str]) -> int:
    text = wanted = README.read_text()
    for (begin, end), tables in ((SPEED, render()), (ACCURACY, render_experiments())):
        head, rest = wanted.split(begin)
        _, tail = rest.split(end)
        wanted = f"{head}{begin}\n{tables}\n{end}{tail}"
    if "--check" in arguments:
        if wanted != text:
            print("README.md differs from bench/results: run python bench/readme.py", file=sys.stderr)
        return int(wanted != text)
    README.write_text(wanted)
    return 0


def render() -> str:
    """All tables, a paragraph for each results file."""
    parts = [render_layers(path) for path in sorted(RESULTS.glob("ops-*.json"))]
    parts += [render_networks(path) for path in sorted(RESULTS.glob("demo-*.json"))]
    parts += [render_whole(path) for path in sorted(RESULTS.glob("networks-*.json"))]
    parts += [render_memory(path) for path in sorted(RESULTS.glob("memory-*.json"))]
    parts += [render_training(path) for path in sorted(RESULTS.glob("train-*.json"))]
    return "\n\n".join(parts)


def render_experiments() -> str:
    """What each experiment that was done asked, and found."""
    paths = [path for name in EXPERIMENTS for path in sorted(RESULTS.glob(f"{name}-*.json"))]
    return "\n\n".join(map(render_experiment, paths))


def render_experiment(path: Path) -> str:
    """Its question, and a row for each comparison."""
    report = json.loads(path.read_text())
    source = f"({_where(report['machine'])}; {_link(path)})"
    lines = [
        f"{report['question']} `vpns reproduce {report['experiment']}` {source}:",
        "",
        "| | difference in points (95 %) | p | pairs of runs | could be seen |",
        "|---|---|---|---|---|",
    ]
    for test in report["tests"]:
        # Arms are lettered.
        first, second = (
            re.sub(r"^([a-d])_", r"(\1) ", test[name]).replace("_", " ") for name in ("first", "second")
        )
        name = f"{second} against {first}{' (primary)' if test['is_primary'] else ''}"
        points = f"{test['difference']:+.1f} ({test['low']:+.1f} to {test['high']:+.1f})"
        numbers = f"{test['p_value']:.2g} | {test['pairs']} | {test['detectable']:.1f}"
        lines.append(f"| {name} | {points} | {numbers} |")
    costs = {"exp2": _frame_costs, "exp3": _channel_costs}.get(report["experiment"])
    if costs is not None:
        lines += ["", *costs(report["table"])]
    return "\n".join(lines)


def _frame_costs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a wider frame costs."""
    lines = [
        "| frame | parameters | accuracy, % | ms per update | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {row['frame']} of {row['of_canvas']} px | {row['parameters']:,} | {row['accuracy']:.1f} | "
        f"{row['ms_per_update']:.0f} | {row['peak_mib']:.0f} |"
        for row in rows
    ]


def _channel_costs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What multiply-adds promise, and what was measured."""
    lines = [
        "| channels | accuracy, % | multiply-adds left | promised | measured, over the best dense |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        left = row["operations"] / row["dense_operations"]
        lines.append(
            f"| {row['arm']} | {row['accuracy']:.1f} | {left:.0%} | {1 / left:.1f}x | {row['speedup']:.1f}x "
            f"({row['sparse_ms']:.1f} ms) |"
        )
    return lines


def render_layers(path: Path) -> str:
    """ResNet-18's 3x3 layers: one row per pattern and dtype, one column per density."""
    report = json.loads(path.read_text())
    rows = [r for r in report["rows"] if r["network"] == "resnet18" and r["kernel_size"] == [3, 3]]
    rows = [r for r in rows if r["batch"] == 16 and r["density"] in DENSITIES and r.get("asked") != "auto"]
    lines = [
        "ResNet-18's 3x3 layers at 224 px, batch 16, against the best dense of float32 and bfloat16; "
        f"geometric mean, and least to most ({_where(report['fingerprint'])}; {_link(path)}):",
        "",
        "| pattern | " + " | ".join(f"density {density:g}" for density in DENSITIES) + " |",
        "|---|" + "---|" * len(DENSITIES),
    ]
    for pattern, dtype in sorted({(r["pattern"], r["dtype"]) for r in rows}):
        form = [r for r in rows if (r["pattern"], r["dtype"]) == (pattern, dtype)]
        cells = [_ratios([r for r in form if r["density"] == density]) for density in DENSITIES]
        lines.append(f"| {pattern}, {dtype} | " + " | ".join(cells) + " |")
    selection = report["selection"]
    ours, theirs = (selection[name]["median_ms"] for name in ("select_threshold", "torch.kthvalue"))
    lines += [
        "",
        f"Selecting the threshold among {selection['scores']:,} scores: {ours:.1f} ms, "
        f"`torch.kthvalue` {theirs:.0f} ms.",
    ]
    return "\n".join(lines)


def _ratios(rows: list[dict[str, Any]]) -> str:
    ratios = [r["ratios"][r["best_dense"]]["median"] for r in rows]
    if not ratios:
        return "not measured"
    return f"{geometric_mean(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"


def render_networks(path: Path) -> str:
    """A pruned network whole: the run's own accuracy and times."""
    report = json.loads(path.read_text())
    name = f"{report['model']}, {report['pattern']} at density {report['density']:g}"
    lines = [
        f"`make demo`: {name}; accuracy {report['sparse_accuracy_prompted']:.1f} % with the prompt, dense "
        f"{report['dense_accuracy']:.1f} % ({_where(report['machine'])}; {_link(path)}).",
        "",
        "| whole network | best dense | sparse | speed-up (95 %) |",
        "|---|---|---|---|",
    ]
    for network in report["networks"]:
        lines.append(
            f"| {network['image_size']} px, batch {network['batch']} | {network['dense_ms']:.1f} ms "
            f"({network['best_dense']}) | {network['sparse_ms']:.1f} ms | {network['speedup']:.1f}x "
            f"({network['speedup_low']:.1f} to {network['speedup_high']:.1f}) |"
        )
    return "\n".join(lines)


def render_whole(path: Path) -> str:
    """What `vpns bench` wrote: one row per network, image size, batch and pattern, one column per density."""
    report = json.loads(path.read_text())
    cells = report["cells"]
    densities = sorted({cell["density"] for cell in cells}, reverse=True)
    lines = [
        "Whole networks with random masks, deployed, against the fastest dense engine (torch, torch.compile, "
        f"ONNX Runtime, OpenVINO), by `vpns bench` ({_where(report['machine'])}; {_link(path)}, "
        f"[plot](bench/results/{path.with_suffix('.svg').name})):",
        "",
        "| network | best dense | " + " | ".join(f"density {density:g}" for density in densities) + " |",
        "|---|---|" + "---|" * len(densities),
    ]
    forms = dict.fromkeys((c["model"], c["size"], c["batch"], c["pattern"]) for c in cells)
    for form in forms:
        mine = [c for c in cells if (c["model"], c["size"], c["batch"], c["pattern"]) == form]
        by_density = {cell["density"]: cell for cell in mine}
        columns = [_speedup(by_density.get(density)) for density in densities]
        model, size, batch, pattern = form
        lines.append(
            f"| {model}, {size} px, batch {batch}, {pattern} | {mine[0]['dense_ms']:.1f} ms "
            f"({mine[0]['best_dense']}) | " + " | ".join(columns) + " |"
        )
    return "\n".join(lines)


def _speedup(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    interval = f"{cell['speedup_low']:.1f} to {cell['speedup_high']:.1f}"
    return f"{cell['speedup']:.1f}x ({interval}), {cell['sparse_ms']:.1f} ms"


def render_memory(path: Path) -> str:
    """What each engine adds to a process."""
    report = json.loads(path.read_text())
    taken = ", ".join(f"{row['engine']} {row['added_mb']:.0f} MB" for row in report["rows"])
    return (
        f"Peak memory of {report['model']}, batch {report['batch']}, {report['size']} px, above that of the "
        f"imports, ours at block:32x32 and density 0.1: {taken} "
        f"({_where(report['fingerprint'])}; {_link(path)})."
    )


def render_training(path: Path) -> str:
    """Whole iterations at one density and batch: ours by pattern and dtype, and every engine of torch."""
    report = json.loads(path.read_text())
    rows = [r for r in report.get("steps", []) if (r["canvas"], r["batch"]) == TRAINED and r["iteration"]]
    engines = list(dict.fromkeys(r["arm"] for r in rows if r["who"] != "ours"))
    lines = [
        f"Measured training: ResNet-18 at {TRAINED[0]} px, batch {TRAINED[1]}, density {TRAINED_DENSITY:g}, "
        "ms per iteration against the published scheme in torch; released search and tuning make two updates "
        f"({_where(report['fingerprint'])}; {_link(path)}).",
        "",
        "| iteration | ours | " + " | ".join(engines) + " | over the fastest (95 %) |",
        "|---|---|" + "---|" * (len(engines) + 1),
    ]
    for row in rows:
        is_plain = (row["start"], row["prompt_in"]) == ("uniform", "both")
        if row["who"] != "ours" or row["density"] != TRAINED_DENSITY or not is_plain:
            continue
        cell = (row["stage"], row["variant"])
        times = {r["arm"]: r["iteration"]["median_ms"] for r in rows if (r["stage"], r["variant"]) == cell}
        theirs = [f"{times[engine]:.0f}" if engine in times else "-" for engine in engines]
        ratio = min(row["ratios"].values(), key=lambda found: found["median"])
        lines.append(
            f"| {' '.join(cell)}, {row['pattern']}, {row['dtype']} | {row['iteration']['median_ms']:.0f} | "
            + " | ".join(theirs)
            + f" | {ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f}) |"
        )
    return "\n".join(lines)


def _link(path: Path) -> str:
    return f"[{path.name}](bench/results/{path.name})"


def _where(fingerprint: dict[str, Any]) -> str:
    isa = fingerprint["isa"][-1].upper()
    return f"{fingerprint['date']}, {fingerprint['cpu']}, {isa}, {fingerprint['threads']} threads"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
