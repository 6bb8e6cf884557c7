"""Where do the numbers of the docs come from? From the JSON files in bench/results, by this script alone.

python -m bench.readme           rewrite the tables of README.md, docs/results.md and docs/why_not_faster.md
python -m bench.readme --check   exit 1 where they say something else
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench.readme_experiments import find_experiments, render_experiments, render_prompts
from bench.readme_goals import render_goals
from bench.readme_headlines import render_headlines
from bench.readme_reasons import render_reasons
from bench.readme_source import link, where

ROOT = Path(__file__).resolve().parents[1]
DENSITIES = (0.2, 0.1, 0.05)
# Pixels and batch of the training that is shown, and its density.
TRAINED, TRAINED_DENSITY = (224, 32), 0.1
RESULTS = ROOT / "bench" / "results"


def main(arguments: Sequence[str]) -> int:
    experiments = find_experiments(RESULTS)
    brief = [path for path in experiments if path.name.startswith("arms-")]
    parts = {
        "README.md": {"speed": render_headlines(RESULTS), "accuracy": render_experiments(brief)},
        "docs/results.md": {
            "speed": render(),
            "experiments": render_experiments(experiments),
            "prompts": render_prompts(RESULTS),
            "goals": render_goals(RESULTS),
        },
        "docs/why_not_faster.md": render_reasons(RESULTS),
    }
    stale = []
    for name, tables in parts.items():
        path = ROOT / name
        text = path.read_text()
        wanted = replace_tables(text, tables, to_root="../" * name.count("/"))
        if wanted == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(wanted)
    if stale and "--check" in arguments:
        print(f"{', '.join(stale)}: other than bench/results; run python -m bench.readme", file=sys.stderr)
        return 1
    return 0


def replace_tables(text: str, tables: Mapping[str, str], to_root: str) -> str:
    """Put each table between its marks, links to the results as they are from the file's own folder."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        text = f"{head}{begin}\n{table.replace('](bench/', f']({to_root}bench/')}\n{end}{tail}"
    return text


def render() -> str:
    """All tables of speed, a paragraph for each results file."""
    parts = [render_layers(path) for path in sorted(RESULTS.glob("ops-*.json"))]
    parts += [render_networks(path) for path in sorted(RESULTS.glob("demo-*.json"))]
    parts += [render_whole(path) for path in sorted(RESULTS.glob("networks-*.json"))]
    parts += [render_memory(path) for path in sorted(RESULTS.glob("memory-*.json"))]
    parts += [render_training(path) for path in sorted(RESULTS.glob("train-*.json"))]
    return "\n\n".join(parts)


def render_layers(path: Path) -> str:
    """ResNet-18's 3x3 layers: one row per pattern and dtype, one column per density."""
    report = json.loads(path.read_text())
    rows = [r for r in report["rows"] if r["network"] == "resnet18" and r["kernel_size"] == [3, 3]]
    rows = [r for r in rows if r["batch"] == 16 and r["density"] in DENSITIES and r.get("asked") != "auto"]
    lines = [
        "ResNet-18's 3x3 layers at 224 px, batch 16, against the best dense of float32 and bfloat16; "
        f"geometric mean, and least to most ({where(report['fingerprint'])}; {link(path)}):",
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
        f"{report['dense_accuracy']:.1f} % ({where(report['machine'])}; {link(path)}).",
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
    # A folder is a run's, whose masks were learned.
    masks = "learned" if any("/" in name for name in report["settings"]["models"]) else "random"
    lines = [
        f"Whole networks with {masks} masks, deployed, against the fastest dense engine (torch, "
        f"torch.compile, ONNX Runtime, OpenVINO), by `vpns bench` ({where(report['machine'])}; {link(path)}, "
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
        f"({where(report['fingerprint'])}; {link(path)})."
    )


def render_training(path: Path) -> str:
    """Whole iterations at one density and batch: ours by pattern and dtype, and every engine of torch."""
    report = json.loads(path.read_text())
    rows = [r for r in report.get("steps", []) if (r["canvas"], r["batch"]) == TRAINED and r["iteration"]]
    engines = list(dict.fromkeys(r["arm"] for r in rows if r["who"] != "ours"))
    lines = [
        f"Measured training: ResNet-18 at {TRAINED[0]} px, batch {TRAINED[1]}, density {TRAINED_DENSITY:g}, "
        "ms per iteration against the published scheme in torch; released search and tuning make two updates "
        f"({where(report['fingerprint'])}; {link(path)}).",
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
