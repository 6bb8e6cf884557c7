"""Does a dry run say what a run would do and cost, and leave everything as it is?"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.vpns.small_sets import make_set
from vpns import cli
from vpns.config import DataConfig, PretrainConfig, RunConfig, SearchConfig, TuneConfig
from vpns.dry_run import describe_cost
from vpns.estimate import Counts, Line, Rates, measure_rates, peak_bytes, stage_seconds

Capture = pytest.CaptureFixture[str]
TINY = [
    "--model.name=tiny_task:build",
    "--model.source_classes=12",
    "--model.weights=null",
    "--prompt.canvas=16",
    "--prompt.frame=2",
    "--pretrain.epochs=0",
    "--threads=1",
]


@pytest.mark.usefixtures("tiny_task")
def test_settings_data_time_and_memory_are_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    make_set("cifar-100-python", tmp_path / "data", monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--preset", "resnet18-cifar100", "--dry-run", *TINY]) == 0
    settings, _, rest = capsys.readouterr().out.partition("\n---\n")
    assert RunConfig.from_dict(yaml.safe_load(settings)).search.lr == 1e-4
    told = dict(line.split(": ", 1) for line in rest.splitlines())
    assert told["folder"] == "runs/resnet18-cifar100"
    assert told["data"] == "cifar100 in data, 3 classes, images: 27 train, 3 validation, 6 test"
    assert told["weights"] == "none: from a random start"
    assert "with 1 threads (dense " in told["time"]
    assert "GiB of" in told["memory"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("tiny_task")
def test_without_the_data_the_published_counts_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["run", "--preset=resnet18-dtd", "--dry-run", *TINY]
    options = ["--model.source_classes=60", "--model.weights=torchvision:IMAGENET1K_V1"]
    assert cli.main([*asked, *options]) == 0
    out = capsys.readouterr().out
    assert "data: not there: load_dtd: expected dtd/dtd in data.root, got data (--download fetches it)" in out
    assert "weights: IMAGENET1K_V1 of tiny_task:build, which torchvision downloads once" in out
    assert "time: about" in out
    assert list(tmp_path.iterdir()) == []
    # Found before anything is measured.
    assert cli.main(asked) == cli.EXIT_ERROR
    assert "expected at most 12 target classes" in capsys.readouterr().err


def test_half_a_data_set_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from vpns import dry_run

    rates = Rates(dict.fromkeys(("dense", "search", "tune"), Line(1, 0)), 0.0, None)
    monkeypatch.setattr(dry_run, "measure_rates", lambda config: rates)
    make_set("dtd/dtd", tmp_path / "data", monkeypatch)
    next((tmp_path / "data").rglob("*_train3.jpg")).unlink()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--preset=resnet18-dtd", "--dry-run"]) == 0
    assert "data: incomplete: train lacks 1 of 36 files: images/" in capsys.readouterr().out


def test_cost_is_updates_times_their_cost_and_images_times_theirs() -> None:
    config = RunConfig(
        data=DataConfig(),
        pretrain=PretrainConfig(epochs=2, batch_size=100, passes=1),
        search=SearchConfig(epochs=3, batch_size=20, passes=2),
        tune=TuneConfig(epochs=5, batch_size=50),
    )
    rates = Rates({"dense": Line(1, 0.1), "search": Line(2, 0.5), "tune": Line(0, 0.2)}, 0.01, Line(1000, 10))
    counts = Counts(train=100, val=30, test=200)
    found = stage_seconds(config, rates, counts)
    assert found == {
        # 2,746 letters to learn from, 343 to validate with.
        "pretrain": pytest.approx(2 * (28 * (1 + 100 * 0.1) + 3.43)),
        "dense": pytest.approx(5 * (2 * (1 + 50 * 0.1) + 0.3)),
        "search": pytest.approx(3 * (5 * 2 * (2 + 20 * 0.5) + 0.3)),
        "tune": pytest.approx(5 * (2 * 50 * 0.2 + 0.3)),
        "eval": pytest.approx(3 * 200 * 0.01),
    }
    assert peak_bytes(config, rates, counts) == 1000 + 50 * 10
    lines = describe_cost(config, rates, counts, threads=2)
    total = sum(found.values())
    assert lines[0].startswith(
        f"time: about {total / 60:.0f} min with 2 threads (pretrain 10 min, dense 62 s"
    )
    assert "accumulate" not in lines[1]
    huge = Rates(rates.update_s, 0.01, Line(2**50, 0))
    assert "search.accumulate" in describe_cost(config, huge, counts, threads=2)[1]
    assert describe_cost(config, rates, Counts(0, 0, 0), threads=2)[0] == "time: unknown without the data"


def test_memory_is_measured(tiny_task: ModuleType) -> None:
    """In a process of its own, as a dry run is: the memory that other tests freed would be taken again."""
    config = tiny_task.make_config(
        model=tiny_task.ModelConfig("tiny_task:Heavy", source_classes=12),
        prompt=tiny_task.PromptConfig(canvas=32, frame=4),
    )
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        rates = pool.submit(measure_rates, config).result()
    assert rates.update_s.keys() == {"dense", "search", "tune"}
    assert all(line.at(8) > 0 for line in rates.update_s.values())
    assert rates.looked_at_s > 0
    assert rates.memory_bytes is not None
    # conv's output and its exponential are kept for the gradients.
    assert 4 * 2**20 < rates.memory_bytes.each < 50 * 2**20
    assert rates.memory_bytes.base > 2**20
