"""In what order is a report written? Numbers first, then the plots that read them, then the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from vpns.data import ImageSet
from vpns.files import make_folder, write_json, write_tensors, write_text
from vpns.report.diagnosis import diagnose
from vpns.report.facts import STAGES, Facts, read_facts
from vpns.report.finding import Finding
from vpns.report.html import render_html
from vpns.report.markdown import render_markdown
from vpns.report.picture import picture_prompt
from vpns.report.plots import draw_plots
from vpns.report.prose import write_prose
from vpns.report.tables import build_tables, write_table
from vpns.state import SCHEMA_VERSION


def write_report(run_folder: Path, images: ImageSet | None = None) -> None:
    """Write <run_folder>/report: report.md and .html, report.json, config.yaml, a CSV for each table, plots.

    Args:
        images: the run's images where they are loaded already; one of them is shown.

    Raises:
        FileNotFoundError: naming the stage that has not been done yet, and its command.
        ValueError: naming the file that is damaged.
        OSError: the folder cannot be written.
    """
    facts = read_facts(run_folder, images)
    findings = diagnose(facts)
    folder = run_folder / "report"
    make_folder(folder)
    write_json(folder / "report.json", summarise(facts, findings))
    write_text(folder / "config.yaml", yaml.safe_dump(facts.config.to_dict(), sort_keys=False))
    for name, rows in build_tables(facts, findings).items():
        write_table(folder / f"{name}.csv", rows)
    if facts.has_prompt:
        pictures = picture_prompt(facts.config.prompt, facts.prompt, facts.example)
        write_tensors(folder / "prompt.safetensors", pictures)
    plots = draw_plots(folder)
    sections = write_prose(facts, findings, list(plots))
    write_text(folder / "report.md", render_markdown(sections))
    write_text(folder / "report.html", render_html(sections, plots))


def summarise(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """What report.json holds; the timings at the top are those of the run's own canvas."""
    config, machine, tested = facts.config, facts.bench["machine"], facts.result("eval")
    own = facts.bench["networks"][0]
    return {
        "schema_version": SCHEMA_VERSION,
        "method": config.method,
        "model": config.model.name,
        "data": config.data.name,
        "pattern": config.pattern,
        "density": config.density,
        "unit_density": facts.unit_density,
        "weight_density": facts.result("search")["weight_density"],
        "seed": config.seed,
        "dense_accuracy": tested["dense_accuracy"],
        "sparse_accuracy": tested["sparse_accuracy"],
        "sparse_accuracy_prompted": tested["sparse_accuracy_prompted"],
        "accuracy": tested["accuracy"],
        "is_prompted": tested["is_prompted"],
        "test_images": tested["test_images"],
        "val_images": facts.val_images,
        "dense_bytes": facts.dense_bytes,
        "packed_bytes": facts.packed_bytes,
        "image_size": own["image_size"],
        "batch": own["batch"],
        "dense_ms": own["dense_ms"],
        "dense_engine": own["best_dense"].removesuffix(f" {own['dense_dtype']}"),
        "dense_dtype": own["dense_dtype"],
        "sparse_ms": own["sparse_ms"],
        "speedup": own["speedup"],
        "diagnosis": [asdict(finding) for finding in findings],
        "pairs": [asdict(pair) for pair in facts.pairs],
        "seconds": _by_stage(facts, "seconds"),
        "updates": _by_stage(facts, "updates"),
        "images_seen": _by_stage(facts, "images_seen"),
        "layers": facts.result("search")["layers"],
        "networks": facts.bench["networks"],
        "versions": machine["versions"],
        "cpu": machine["cpu"],
        "commit": machine["commit"],
        "dirty": machine["dirty"],
        "machine": machine,
    }


def _by_stage(facts: Facts, key: str) -> dict[str, Any]:
    """A recorded value of every stage that has it."""
    return {stage: facts.result(stage)[key] for stage in STAGES if key in facts.result(stage)}
