"""Do the pages tell the truth? Examples run, commands parse, figures and links hold."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from vpns import cli
from vpns.bench_options import find_bench, parse_bench
from vpns.config import DataConfig, PromptConfig
from vpns.data import DATASETS, LAYOUTS, load_data
from vpns.data_command import parse_data
from vpns.files import read_json, read_tensors
from vpns.methods.base import METHODS
from vpns.prompt import PROMPTS, build_prompt
from vpns.report_options import find_comparison
from vpns.reproduce_options import parse_reproduce
from vpns.run import execute
from vpns.sweep.grid import read_grid
from vpns.sweep_options import parse_sweep
from vpns_kernels.modules import MaskedConv2d
from vpns_kernels.ops import OPS
from vpns_kernels.patterns import PATTERNS, parse_pattern

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", EXTENDING, re.DOTALL))


@pytest.fixture
def registries() -> Iterator[None]:
    """What an example registers is forgotten after it."""
    known: list[dict[str, Any]] = [METHODS, PATTERNS, PROMPTS, DATASETS, LAYOUTS]
    before = [dict(registry) for registry in known]
    yield
    for registry, content in zip(known, before, strict=True):
        registry.clear()
        registry.update(content)


def run_example(path: str) -> dict[str, Any]:
    """What the example would define as the file of that name."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(EXAMPLES[path], path, "exec", dont_inherit=True), names)
    return names


def test_every_example_of_extending_is_run_by_a_test_here() -> None:
    source = Path(__file__).read_text()
    assert len(EXAMPLES) == EXTENDING.count("```python") == 5
    assert all(f'run_example("{path}")' in source for path in EXAMPLES)


@pytest.mark.usefixtures("registries")
def test_the_methods_example_prunes(tmp_path: Path, tiny_task: ModuleType) -> None:
    run_example("vpns/methods/square.py")
    records = execute(tmp_path, tiny_task.make_config(method="square"), "search")
    assert abs(records["search"].result["weight_density"] - 0.3) < 0.01


@pytest.mark.usefixtures("registries")
def test_the_patterns_example_prunes_whole_kernels(tmp_path: Path, tiny_task: ModuleType) -> None:
    run_example("vpns_kernels/patterns/kernel.py")
    execute(tmp_path, tiny_task.make_config(pattern="kernel"), "tune")
    chosen = read_json(tmp_path / "search" / "choice.json")["layers"]
    assert {backend for layer in chosen.values() for backend in layer["backends"]} == {"reference"}
    layer = MaskedConv2d.from_dense(nn.Conv2d(3, 4, 3).requires_grad_(False), parse_pattern("kernel"))
    layer.backends = "cpu"
    with pytest.raises(NotImplementedError, match="single weights or of blocks, got kernel"):
        layer(torch.zeros(1, 3, 8, 8))
    weights = read_tensors(tmp_path / "tune" / "weights.safetensors")
    kernels = weights["conv2.weight"].flatten(2)
    is_kept = (kernels != 0).any(2)
    assert 0 < is_kept.sum() < is_kept.numel()
    assert ((kernels != 0).all(2) == is_kept).all()


@pytest.mark.usefixtures("registries")
def test_the_prompts_example_learns(tmp_path: Path, tiny_task: ModuleType) -> None:
    run_example("vpns/prompt/tint.py")
    execute(tmp_path, tiny_task.make_config(prompt=PromptConfig(kind="tint", canvas=16)), "tune")
    assert (read_tensors(tmp_path / "tune" / "prompt.safetensors")["raw"] != 0).all()


@pytest.mark.usefixtures("registries")
def test_the_data_sets_example_loads(tmp_path: Path) -> None:
    run_example("vpns/data/pairs.py")
    (tmp_path / "pairs").mkdir()
    for index in range(20):
        side = ("left", "right")[index % 2]
        Image.new("RGB", (9, 9), (12 * index,) * 3).save(tmp_path / "pairs" / f"{side}_{index}.png")
    images = load_data(DataConfig(name="pairs", root=str(tmp_path)), seed=7, canvas=8)
    assert (len(images.train), len(images.val), len(images.test)) == (12, 4, 4)
    greys = images.train.images[:, 0, 0, 0] // 12
    assert torch.equal(greys % 2, images.train.labels.to(greys.dtype))
    assert cli.main(["data", "check", str(tmp_path), "--name=pairs"]) == 0


def test_the_backends_example_agrees_with_the_reference() -> None:
    backend = SimpleNamespace(**run_example("vpns_kernels/ops/select_threshold/topk.py"))
    reference = OPS["select_threshold"].module("reference")
    for case in OPS["select_threshold"].cases():
        arguments = case.build()
        scores = arguments["scores"]
        kept = max(1, math.floor(arguments["density"] * sum(map(torch.Tensor.numel, scores)) + 0.5))
        inputs = (scores, kept)
        assert backend.why_not(*inputs) is None
        for ours, theirs in zip(backend.run(*inputs), reference.run(*inputs), strict=True):
            assert torch.equal(ours.double(), theirs.double()) or bool(theirs.isnan())


# Commands


def commands() -> list[str]:
    """Every `vpns ...` of the pages without placeholders, in fences and between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        fenced = re.findall(r"```\n(.*?)```", text, re.DOTALL)
        found += [line for block in fenced for line in block.splitlines()]
        found += re.findall(r"`(vpns [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = [line.strip() for line in found if line.strip().startswith("vpns ")]
    return sorted({one for one in commands if not re.search(r"[<\[…]", one)})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_pages_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("density: 0.5\n")
    (tmp_path / "grid.yaml").write_text("settings: {}\n")
    _, name, *rest = shlex.split(command.split("#")[0])
    if name == "data":
        assert parse_data(rest).folder is not None
    elif name == "sweep":
        assert parse_sweep(rest).grid is not None
    elif name == "reproduce":
        assert parse_reproduce(rest).experiment
    elif name == "doctor":
        assert rest in ([], ["--json"])
    elif name == "bench" and (options := find_bench([name, *rest])) is not None:
        assert parse_bench(options).models
    elif find_comparison([name, *rest]) is None and "--print_config" not in rest:
        # A command that is only named needs no folder.
        assert cli.parse([name, *rest] if rest else [name, "runs/x"]).command == name


def test_the_grid_of_the_pages_is_one(tmp_path: Path) -> None:
    (content,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "many-runs.md").read_text(), re.DOTALL)
    (tmp_path / "grid.yaml").write_text(content)
    grid = read_grid(tmp_path / "grid.yaml")
    assert (len(grid.runs), grid.until) == (16, "report")


def test_commands_are_found() -> None:
    assert len(commands()) > 15
    assert "vpns data check photos" in commands()


# Figures and links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {title.lower().replace(" ", "-") for title in titles}, target


def test_the_table_of_prompts_has_every_kind_with_its_entries() -> None:
    text = (ROOT / "docs" / "concept.md").read_text()
    rows = re.findall(r"^\| `(\w+)`(?:, (\w+))? \| .* \| ([\d,]+)[^|]* \| (yes|no) \|$", text, re.MULTILINE)
    assert {kind for kind, *_ in rows} == set(PROMPTS)
    for kind, variant, entries, is_fused in rows:
        prompt = build_prompt(PromptConfig(kind=kind, variant=variant or "framed", canvas=224, frame=16))
        assert int(entries.replace(",", "")) == prompt.learned
        assert (prompt.variant is not None) == (is_fused == "yes")


def test_the_table_of_data_sets_has_every_layout_with_its_counts() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    for name, layout in LAYOUTS.items():
        if layout.published is not None:
            (row,) = re.findall(rf"^\|[^|]*`{re.escape(name)}`[^|]*\|.*$", text, re.MULTILINE)
            assert f"{layout.published.train:,}" in row
            assert f"{layout.published.test:,}" in row
