"""The figures of docs/why_not_faster.md: layers of the results, chosen by name, and whole networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.readme_source import link, where


@dataclass(frozen=True)
class Layers:
    """Some layers of one cell of `vpns bench`."""

    file: str
    model: str
    pattern: str
    density: float
    names: Sequence[str]


_RESNET18, _GROUPED = "networks-resnet18-zen5", "networks-grouped-zen5"
# By the mark of the page.
LAYERS: Mapping[str, Sequence[Layers]] = {
    "read": [
        Layers(
            _RESNET18, "resnet18", "unstructured", 0.2, ["conv1", "layer1.0.conv1", "layer2.0.downsample.0"]
        )
    ],
    "rest": [
        Layers(_RESNET18, "resnet18", "block:32x32", 0.05, ["conv1", "layer1.0.conv1", "max_pool2d"]),
    ],
    "memory": [
        Layers(
            "networks-resnet50-zen5", "resnet50", "block:32x32", 0.1, ["layer1.0.conv3", "layer4.0.conv1"]
        ),
        Layers(_GROUPED, "mobilenet_v2", "block:16x16", 0.1, ["features.2.conv.0.0", "features.3.conv.0.0"]),
    ],
    "small": [Layers(_RESNET18, "resnet18", "unstructured", 0.1, ["fc"])],
    "single": [
        Layers(_RESNET18, "resnet18", "unstructured", 0.1, ["layer2.1.conv1"]),
        Layers(_RESNET18, "resnet18", "block:32x32", 0.1, ["layer2.1.conv1"]),
    ],
    "channels": [
        Layers(_RESNET18, "resnet18", "channel", 0.1, ["conv1", "layer1.0.conv1", "layer4.1.conv1"]),
    ],
    "groups": [
        Layers(
            _GROUPED,
            "resnext50_32x4d",
            "block:16x16",
            0.1,
            ["layer1.0.conv2", "layer2.1.conv2", "layer3.1.conv2"],
        ),
        Layers(_GROUPED, "mobilenet_v2", "block:16x16", 0.1, ["features.2.conv.1.0"]),
    ],
}
# The whole networks of the first table, in their order.
WHOLE = (_RESNET18, "networks-resnet50-zen5", "networks-vgg16-zen5", _GROUPED)


def render_reasons(folder: Path) -> dict[str, str]:
    """Each table by its mark."""
    reports: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("networks-*.json")):
        reports[path.stem] = json.loads(path.read_text())
    tables = {
        mark: _layers([(_find(reports[g.file], g), g) for g in groups], reports, folder)
        for mark, groups in LAYERS.items()
    }
    return {"whole": _whole(reports, folder), **tables}


def _find(report: dict[str, Any], wanted: Layers) -> dict[str, Any]:
    """The cell with the most images: results of one network may have several batches."""
    cells = [
        c
        for c in report["cells"]
        if (c["model"], c["pattern"], c["density"]) == (wanted.model, wanted.pattern, wanted.density)
    ]
    return max(cells, key=lambda cell: int(cell["batch"]))


def _layers(
    found: Sequence[tuple[dict[str, Any], Layers]], reports: Mapping[str, dict[str, Any]], folder: Path
) -> str:
    lines = [
        "| network | layer | shape | density | best dense ms | sparse ms | runs | of the time | why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, wanted in found:
        rows = {row["layer"]: row for row in cell["layers"]}
        network = f"{cell['model']}, {cell['pattern']} at {cell['density']:g}"
        for name in wanted.names:
            row = rows[name]
            density = "" if row["density"] is None else f"{row['density']:.3f}"
            times = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("dense_ms", "sparse_ms")]
            runs = f"{row['choice']}: {row['kernel']}"
            cells = [
                network,
                name,
                row["shape"] or "",
                density,
                *times,
                runs,
                f"{row['share']:.1%}",
                row["reason"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _sources([wanted.file for _, wanted in found], reports, folder)])


def _whole(reports: Mapping[str, dict[str, Any]], folder: Path) -> str:
    lines = [
        "| network | fewer multiplications by | faster than the best dense by | in sparse layers |",
        "|---|---|---|---|",
    ]
    for file in WHOLE:
        for cell in reports[file]["cells"]:
            name = f"{cell['model']}, batch {cell['batch']}, {cell['pattern']} at {cell['density']:g}"
            ratios = f"{cell['flops_ratio']:.1f}x | {cell['speedup']:.1f}x"
            lines.append(f"| {name} | {ratios} | {cell['sparse_flops_frac']:.0%} |")
    return "\n".join([*lines, "", _sources(WHOLE, reports, folder)])


def _sources(files: Sequence[str], reports: Mapping[str, dict[str, Any]], folder: Path) -> str:
    named = [
        f"{link(folder / f'{file}.json')}: {where(reports[file]['machine'])}" for file in dict.fromkeys(files)
    ]
    return f"({'; '.join(named)})"
