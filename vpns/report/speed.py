"""How is time told? The machine, the engines, the layers, and where the time goes if nothing is gained."""

from __future__ import annotations

from typing import Any

from vpns.report.blocks import Section, Table
from vpns.report.facts import Facts
from vpns.report.markdown import show_number

# Layers that are named where time goes, the costliest first.
_NAMED = 3


def describe_machine(facts: Facts) -> str:
    """What was measured on, and how."""
    machine = facts.bench["machine"]
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['threads']} threads, instruction sets "
        f"{', '.join(machine['isa']) or 'unknown'}; medians of interleaved runs. The headline is "
        "the ratio to the fastest dense engine measured "
        "(`vpns bench --model FOLDER` asks torch.compile, too). Rows: "
        "[engines.csv](engines.csv), [layers.csv](layers.csv)."
    )


def count_engines(network: dict[str, Any]) -> str:
    """How many dense engines the network was timed beside."""
    count = len(network["dense"])
    return f"{count} dense engine{'s' if count != 1 else ''} measured beside it"


def show_engines(network: dict[str, Any]) -> Section:
    """A whole network, dense and sparse."""
    rows = [
        (row["engine"], *(show_number(row[key]) for key in ("median_ms", "p20_ms", "p80_ms")))
        for row in tabulate_engines(network)
    ]
    told = (
        f"{network['sparse_flops_frac']:.1%} of the FLOPs of pruned layers ran sparse; largest "
        f"relative output error {network['max_rel_err']:.2g}."
    )
    title = f"{network['image_size']} px, batch {network['batch']}{_place(network)}: {show_ratio(network)}"
    return Section(title, (Table(("engine", "median, ms", "20%", "80%"), rows), told), level=3)


def tabulate_engines(network: dict[str, Any]) -> list[dict[str, Any]]:
    """Every dense engine, fastest first, then the sparse network."""
    place = {"device": network.get("device", "cpu")}
    place |= {"image_size": network["image_size"], "batch": network["batch"]}
    times = ("median_ms", "p20_ms", "p80_ms")
    dense = [
        {**place, "engine": name, **{key: timed[key] for key in times}}
        for name, timed in sorted(network["dense"].items(), key=lambda item: item[1]["median_ms"])
    ]
    sparse = {**place, "engine": "sparse", "median_ms": network["sparse_ms"], "p20_ms": None, "p80_ms": None}
    return [*dense, sparse]


def show_layers(network: dict[str, Any]) -> Section:
    """Every pruned layer, how it runs and why."""
    rows = [
        (
            row["layer"],
            row["shape"],
            f"{row['density']:.3f}",
            show_number(row["dense_ms"]),
            show_number(row["sparse_ms"]),
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            f"{row['choice']} ({row['kernel']})",
            "-" if row["share"] is None else f"{row['share']:.0%}",
            row["reason"],
        )
        for row in network["layers"]
    ]
    header = (
        "layer",
        "shape ",
        "density",
        "dense, ms",
        "sparse, ms",
        "speedup",
        "runs ",
        "of the time",
        "why ",
    )
    return Section(f"Layers at {network['image_size']} px{_place(network)}", (Table(header, rows),), level=3)


def _place(network: dict[str, Any]) -> str:
    """Where it was measured, if not on the CPU; that of old files is not told."""
    return "" if network.get("device", "cpu") == "cpu" else " on the GPU"


def explain_time(network: dict[str, Any]) -> str:
    """Where the time of a network that does not gain goes."""
    layers = network["layers"]
    used = [row["sparse_ms" if row["choice"] == "sparse" else "dense_ms"] or 0.0 for row in layers]
    total = network["sparse_ms"]
    left_dense = [row for row in layers if row["choice"] != "sparse"]
    costly = sorted(zip(used, layers, strict=True), key=lambda pair: -pair[0])[:_NAMED]
    named = ", ".join(f"{row['layer']} {ms:.2f} ms ({row['choice']}: {row['reason']})" for ms, row in costly)
    parts = [
        f"{len(left_dense)} of {len(layers)} layers stayed dense, since sparse was no faster there; "
        f"{network['sparse_flops_frac']:.0%} of the FLOPs ran sparse.",
        f"Most time: {named}.",
    ]
    if network["sparse_dtype"] != network["dense_dtype"]:
        parts.append(f"Dense ran in {network['dense_dtype']}, sparse in {network['sparse_dtype']}.")
    outside = total - sum(used)
    if outside > total / 2:
        parts.append(
            f"{outside:.2f} of {total:.2f} ms lie outside the pruned layers (batch norm, activation, calls): "
            "at this size no mask can help."
        )
    parts.append("Try larger images or batches, a larger block, or a lower density.")
    return " ".join(parts)


def show_ratio(network: dict[str, Any]) -> str:
    """The speedup with its interval; a loss is called one."""
    ratio = f"{network['speedup']:.2f}x"
    if network["speedup_low"] is not None:
        ratio += f" ({network['speedup_low']:.2f} to {network['speedup_high']:.2f})"
    return ratio if network["speedup"] >= 1 else f"**{ratio}: slower**"
