"""The README tells the truth: its numbers are those of the results files, its commands and examples work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vpns_kernels import parse_pattern

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_numbers_in_the_readme_are_those_of_the_results() -> None:
    command = [sys.executable, "-m", "bench.readme", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_were_measured_on_clean_code_that_is_an_ancestor(path: Path) -> None:
    report = json.loads(path.read_text())
    machine = report.get("fingerprint") or report["machine"]
    assert machine["dirty"] is False
    assert git("merge-base", "--is-ancestor", machine["commit"], "HEAD").returncode == 0


def test_the_example_of_the_kernels_alone_runs() -> None:
    (example,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    names = {"model": model, "x": x}
    exec(compile(example, "README.md", "exec"), names)
    y = names["y"]
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_the_example_of_training_runs() -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(
        r"```python\n(from vpns_kernels.convert import densify, sparsify\n.*?)```", text, re.DOTALL
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 5))
    masks = {"0": torch.zeros(32, 3, 3, 3, dtype=torch.bool)}
    masks["0"][:, :, 1] = True
    batches = [(torch.randn(4, 3, 9, 9), torch.arange(4))] * 3
    names = {
        "model": model,
        "masks": masks,
        "batches": batches,
        "torch": torch,
        "parse_pattern": parse_pattern,
    }
    exec(compile(example, "README.md", "exec"), names)
    trained = names["model"]
    assert isinstance(trained, nn.Sequential)
    assert type(trained[0]) is nn.Conv2d
    assert bool((trained[0].weight[~masks["0"]] == 0).all())
    changed = trained[0].weight != model[0].weight * masks["0"]
    assert bool(changed[masks["0"]].any())


def test_every_option_in_the_readme_exists() -> None:
    from vpns.cli import main

    text = (ROOT / "README.md").read_text()
    options = set(re.findall(r"--([a-z_]+\.[a-z_]+)", text)) | {"dtype", "backend", "check"}
    assert len(options) >= 8
    help_text = subprocess.run(
        [sys.executable, "-m", "vpns", "run", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not [option for option in options if f"--{option}" not in help_text]
    assert main(["run", "--no_such_option", "1"]) != 0
