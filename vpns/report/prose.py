"""What does the report tell people? The result first, then where it comes from, then how to have it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from vpns.prompt import build_prompt
from vpns.report.blocks import Block, Command, Picture, Section, Table
from vpns.report.facts import Facts
from vpns.report.finding import Finding
from vpns.report.markdown import show_number
from vpns.report.speed import count_engines, describe_machine, show_engines, show_layers, show_ratio
from vpns.report.tables import tabulate_training

_SIGNS = {"ok": "ok", "unclear": "**unclear**", "failed": "**FAILED**", "absent": "-"}
_CAPTIONS = {
    "curves": "Loss and accuracy over the epochs of each stage; validation chose the checkpoint. "
    "Pretraining is another task, so its numbers do not compare with those of the others.",
    "prompt": "The learned prompt, and one validation image as the network sees it.",
    "density": "The share of its weights that each layer keeps.",
    "times": "Dense and sparse time of each layer; a speedup below 1 is a loss.",
}


def write_prose(facts: Facts, findings: Sequence[Finding], plots: Sequence[str]) -> list[Section]:
    """The whole report.

    Args:
        plots: names of the plots that were drawn.
    """
    networks = facts.bench["networks"]
    title = f"{facts.config.model.name} pruned to density {facts.config.density:g} ({facts.config.pattern})"
    return [
        Section(title, (_summarise(facts),), level=1),
        Section("Result", (_show_result(facts),)),
        Section("Diagnosis", _show_diagnosis(findings)),
        Section("Accuracy", (*_show_accuracy(facts), *_show_plot("curves", plots))),
        Section("Prompt", (_describe_prompt(facts), *_show_plot("prompt", plots))),
        Section("Density", (_describe_mask(facts), *_show_plot("density", plots))),
        Section("Time", (describe_machine(facts), *_show_plot("times", plots))),
        *(show_engines(network) for network in networks),
        *(show_layers(network) for network in networks),
        Section("Training", _show_training(facts)),
        Section("Again", _tell_how(facts)),
    ]


def _summarise(facts: Facts) -> str:
    """The whole result in a paragraph."""
    tested, pair = facts.result("eval"), facts.pair("dense", facts.own)
    where = "with" if tested["is_prompted"] else "without"
    speeds = "; ".join(
        f"at {network['image_size']} px {_tell_speed(network['speedup'])} ({network['best_dense']})"
        for network in facts.bench["networks"]
    )
    return (
        f"Method {facts.config.method} kept {facts.unit_density:.2%} of the units of the mask's pattern "
        f"({facts.result('search')['weight_density']:.2%} of the weights) for the task "
        f"{facts.config.data.name}. The sparse network gets {tested['accuracy']:.2f}% of "
        f"{tested['test_images']:,} test images right ({where} prompt), dense "
        f"{tested['dense_accuracy']:.2f}% ({pair.difference:+.2f} points). "
        f"Deployed, it runs {speeds}, against the fastest of {count_engines(facts.bench['networks'][0])}."
    )


def _tell_speed(speedup: float) -> str:
    return f"{speedup:.2f}x as fast" if speedup >= 1 else f"**slower, {speedup:.2f}x as fast**"


def _show_result(facts: Facts) -> Table:
    tested, found = facts.result("eval"), facts.result("search")
    rows: list[tuple[str, ...]] = []
    for name, key, label in (
        ("sparse", "sparse_accuracy", "without prompt"),
        ("sparse, prompted", "sparse_accuracy_prompted", "with prompt"),
    ):
        if tested[key] is not None:
            own = " (this run's own)" if name == facts.own else ""
            change = f"{facts.pair('dense', name).difference:+.2f} points"
            dense, sparse = f"{tested['dense_accuracy']:.2f}", f"{tested[key]:.2f}"
            rows.append((f"test accuracy, %, {label}{own}", dense, sparse, change))
    weights = sum(row["weights"] for row in found["layers"])
    kept = sum(row["kept"] for row in found["layers"])
    rows.append(("weights of pruned layers", f"{weights:,}", f"{kept:,}", f"{kept / weights:.2%}"))
    sizes = (facts.dense_bytes, facts.packed_bytes)
    mebibytes = (f"{size / 2**20:.3g}" for size in sizes)
    rows.append(("size, MiB", *mebibytes, f"{facts.packed_bytes / facts.dense_bytes:.2%}"))
    for network in facts.bench["networks"]:
        name = f"time, ms, {network['image_size']} px, batch {network['batch']}"
        dense = f"{network['dense_ms']:.3g} ({network['best_dense']})"
        rows.append((name, dense, f"{network['sparse_ms']:.3g}", show_ratio(network)))
    return Table(("", "dense", "sparse", "sparse against dense"), rows)


def _show_diagnosis(findings: Sequence[Finding]) -> tuple[Block, ...]:
    rows = [
        (f.name, show_number(f.value), show_number(f.limit), _SIGNS[f.verdict], f.cause) for f in findings
    ]
    bad = sum(finding.verdict == "failed" for finding in findings)
    unclear = sum(finding.verdict == "unclear" for finding in findings)
    head = f"{bad} of {len(findings)} checks failed, {unclear} unclear." if bad + unclear else "All is well."
    return head, Table(("", "value", "limit", "verdict ", "cause, and what to try "), rows)


def _show_accuracy(facts: Facts) -> tuple[Block, ...]:
    rows = [
        (
            f"{pair.first} → {pair.second}",
            f"{pair.only_first:,}",
            f"{pair.only_second:,}",
            f"{pair.both_right:,}",
            f"{pair.both_wrong:,}",
            f"{pair.difference:+.2f} ± {pair.standard_error:.2f}",
            f"{pair.p_value:.2g}",
        )
        for pair in facts.pairs
    ]
    header = ("", "only first right", "only second right", "both", "neither", "difference, points", "p")
    return (
        f"The same {facts.pairs[0].images:,} test images through each network, touched once, after all "
        "choices were made. Dense is the same pretrained network, tuned as long on plain images.",
        Table(header, rows),
        "After ± is one standard error of the paired difference; p is the exact sign test's. Every "
        "image's logits: [outputs.safetensors](../eval/outputs.safetensors).",
    )


def _describe_prompt(facts: Facts) -> str:
    if not facts.has_prompt:
        return "This run has no prompt: images fill the canvas."
    prompt = facts.config.prompt
    gain = facts.pair("sparse", "sparse, prompted").difference
    return (
        f"{build_prompt(prompt).describe()}; used in: "
        f"{prompt.prompt_in}{', frozen at its start' if prompt.frozen else ''}. At inference it changes the "
        f"sparse network's accuracy by {gain:+.2f} points."
    )


def _describe_mask(facts: Facts) -> str:
    found = facts.result("search")
    return (
        f"{facts.units:,} units compete; density {facts.config.density:g} was asked for, "
        f"{facts.unit_density:.4%} of the units and {found['weight_density']:.4%} of the weights are kept. "
        f"Smallest kept score {found['threshold']:.4g}, ties kept {found['ties_kept']}. "
        "Rows: [density.csv](density.csv)."
    )


def _show_plot(name: str, plots: Sequence[str]) -> tuple[Block, ...]:
    return (Picture(name, _CAPTIONS[name]),) if name in plots else ()


def _show_training(facts: Facts) -> tuple[Block, ...]:
    keys = ("updates", "images_seen", "seconds", "val_accuracy", "best_epoch")
    rows = [(row["stage"], *(_show_count(row[key]) for key in keys)) for row in tabulate_training(facts)]
    header = ("stage", "updates", "images seen", "seconds", "best validation accuracy, %", "in epoch")
    told = "Rows: [training.csv](training.csv), [curves.csv](curves.csv)."
    return Table(header, rows), told, *(_tell_who(stage, facts.choices[stage]) for stage in facts.choices)


def _tell_who(stage: str, layers: Mapping[str, Any]) -> str:
    """How many layers of a stage each backend computed, by pass."""
    if not layers:
        return f"Stage {stage} ran on torch's dense layers."
    passes = ("forward", "input gradient", "weight gradient")
    counts = [sum(row["backends"][i] != "reference" for row in layers.values()) for i in range(len(passes))]
    told = ", ".join(f"{name} in {count}" for name, count in zip(passes, counts, strict=True))
    return (
        f"Stage {stage}: of {len(layers)} masked layers the sparse kernels computed the {told}; torch's "
        f"dense ones the rest, expected to be faster there ([choice.json](../{stage}/choice.json))."
    )


def _tell_how(facts: Facts) -> tuple[Block, ...]:
    folder = facts.folder.as_posix()
    again = shlex.join(["vpns", "run", f"{folder}-again", "--config", f"{folder}/report/config.yaml"])
    machine = facts.bench["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    state = " with uncommitted changes" if machine["dirty"] else ""
    return (
        Command(again),
        f"All settings, the seed {facts.config.seed} and the "
        f"{facts.config.threads} threads among them, are in [config.yaml](config.yaml). "
        f"Commit {machine['commit'] or 'unknown'}{state}; "
        f"{versions}. The numbers of this page: [report.json](report.json).",
    )


def _show_count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
