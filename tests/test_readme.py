"""The README tells the truth: its numbers are those of the results files, its commands and examples work."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import vpns
import vpns.run
import vpns_kernels
from vpns.cli import main, parse

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_numbers_in_the_readme_are_those_of_the_results() -> None:
    command = [sys.executable, "-m", "bench.readme", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_speed_that_the_readme_shows_has_machine_date_and_commit_and_hides_no_slowdown() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- speed:begin -->")[1].split("<!-- speed:end -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "x (" in line]
    assert 5 <= len(rows) <= 8
    assert all(re.search(r"\| \d{4}-\d\d-\d\d, [^|]+, [0-9a-f]{7} \|$", row) for row in rows)
    slower = [row for row in rows if float(re.findall(r"([\d.]+)x \(", row)[0]) < 1]
    assert slower
    assert all("slower" in row for row in slower)
    assert re.search(r"!\[[^\]]+\]\(bench/results/networks-\S+\.svg\)", text)


def measured_at(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text())
    machine: dict[str, Any] = report.get("fingerprint") or report["machine"]
    return machine


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_were_measured_on_clean_code(path: Path) -> None:
    machine = measured_at(path)
    assert machine["dirty"] is False
    assert re.fullmatch("[0-9a-f]{40}", machine["commit"])


def test_results_were_measured_at_ancestors_of_this_commit() -> None:
    is_whole = shutil.which("git") and git("rev-parse", "--is-shallow-repository").stdout.strip() == "false"
    if not is_whole:
        pytest.skip("the history is not here (a shallow clone, or no clone)")
    commits = {measured_at(path)["commit"] for path in RESULTS}
    foreign = [c for c in commits if git("merge-base", "--is-ancestor", c, "HEAD").returncode != 0]
    assert not foreign


def test_the_example_of_the_kernels_alone_runs() -> None:
    (example,) = re.findall(
        r"```python\n(import torch\nfrom vpns_kernels.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
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
        r"```python\n(from vpns_kernels import densify, parse_pattern, sparsify\n.*?)```", text, re.DOTALL
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
    }
    exec(compile(example, "README.md", "exec"), names)
    trained = names["model"]
    assert isinstance(trained, nn.Sequential)
    assert type(trained[0]) is nn.Conv2d
    assert bool((trained[0].weight[~masks["0"]] == 0).all())
    changed = trained[0].weight != model[0].weight * masks["0"]
    assert bool(changed[masks["0"]].any())


def test_the_example_of_deploying_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import vpns_kernels\n.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 5)).eval()
    names = {"model": model, "images": torch.randn(2, 3, 9, 9)}
    exec(compile(example, "README.md", "exec"), names)
    engine, logits = names["engine"], names["logits"]
    assert isinstance(engine, vpns_kernels.Engine)
    assert isinstance(logits, torch.Tensor)
    assert torch.equal(engine(names["images"]), logits)


def test_the_example_of_pruning_asks_for_the_same_run_as_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(from pathlib import Path\n\nfrom vpns .*?)```", text, re.DOTALL)
    (command,) = re.findall(r"```\n(vpns run runs/mine .*?)```", text, re.DOTALL)
    asked: list[tuple[Path, Any]] = []

    def execute(folder: Path, config: Any, observers: Any) -> dict[str, Any]:
        asked.append((folder, config))
        return {"eval": SimpleNamespace(result={"accuracy": 90.0})}

    monkeypatch.setattr(vpns.run, "execute", execute)
    exec(compile(example, "README.md", "exec"), {})
    by_command = parse(shlex.split(command.replace("\\\n", " "))[1:])
    assert asked == [(by_command.folder, by_command.config)]


def test_the_engines_page_prints_what_its_example_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "engine.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "engine.md", "exec"), {})
    printed = capsys.readouterr().out
    # Times, kernels and choices are the machine's; steps, shapes, patterns and columns are not.
    tables = [[line.split("  ")[0] for line in part.splitlines()[-8:]] for part in (shown, printed)]
    assert tables[0] == tables[1]
    assert tables[0][0] == "step"
    head = next(line for line in printed.splitlines() if line.startswith("step"))
    columns = [column.strip() for column in re.split(r"  +", head)]
    assert all(f"`{column}`" in text for column in columns)
    assert re.findall(r"block:32x32 +0.056", shown) == re.findall(r"block:32x32 +0.056", printed) != []


def test_every_public_name_stands_in_the_list_of_them() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    rooms = [
        vpns,
        vpns_kernels,
        *map(importlib.import_module, re.findall(r"^\| `(vpns_[\w.]+)` \|", text, re.M)),
    ]
    assert len(rooms) == 9
    names = {name for room in rooms for name in getattr(room, "__all__", ())}
    assert not {name for name in names if f"`{name}`" not in text}
    # And what stands there is there.
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(listed) == len(set(listed)) == len(vpns_kernels.__all__) + len(vpns.__all__)
    assert set(listed) == {*vpns_kernels.__all__, *vpns.__all__}


# Options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("run", "pretrain", "dense", "search", "tune", "eval", "export", "report")
HELP_OF = {
    **{stage: [stage, "--help"] for stage in STAGES},
    "bench": ["bench", "--model", "resnet18", "--help"],
    "data": ["data", "--help"],
    "sweep": ["sweep", "--help"],
    "reproduce": ["reproduce", "--help"],
}


def pieces_of_code(page: Path) -> Iterator[str]:
    """Lines of the fences that are no Python, and what stands between backticks."""
    text = page.read_text().replace("\\\n", " ")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for language, content in fences:
        if not language:
            yield from (line.split("#")[0].strip() for line in content.splitlines())
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`]+)`", prose)


def options_by_command() -> dict[str, set[str]]:
    """Every option of the pages by sub-command of vpns or script of bench; "" where it stands alone."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for piece in pieces_of_code(page):
            options = set(re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", piece))
            words = piece.split()
            if not options or words[0] in ("pip", "$CXX", "g++", "cmake"):
                continue
            # torchrun's own options stand before the module that it runs.
            after = piece.partition("-m vpns ")[2]
            if words[0] == "torchrun" and after:
                options, name = set(re.findall(r"--[A-Za-z][\w.-]*", after)), after.split()[0]
            elif words[0] == "vpns":
                name = words[1]
            elif words[0] == "python":
                name = words[2] if words[1] == "-m" else words[1]
            else:
                name = ""
            if options:
                found.setdefault(name, set()).update(options)
    return found


def text_with_options(name: str, helps: dict[str, str]) -> str:
    """Where the options of a command are named: its help, or the source of a script."""
    if name == "":
        return "\n".join([*helps.values(), "--json"])
    if name == "doctor":
        return "--json"
    if name in helps:
        return helps[name]
    return (ROOT / (name if name.endswith(".py") else f"{name.replace('.', '/')}.py")).read_text()


def test_every_option_of_the_pages_exists(capsys: pytest.CaptureFixture[str]) -> None:
    found = options_by_command()
    assert sum(map(len, found.values())) > 40
    helps = {}
    for name, arguments in HELP_OF.items():
        with contextlib.suppress(SystemExit):
            main(arguments)
        helps[name] = capsys.readouterr().out
    missing = [
        (name, option)
        for name, options in found.items()
        for option in options
        if not re.search(rf"{re.escape(option)}(?![\w.-])", text_with_options(name, helps))
    ]
    assert not missing
    assert main(["run", "--no_such_option", "1"]) != 0
