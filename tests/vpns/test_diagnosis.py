"""Does a report name what went wrong in a run, and why?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vpns.report_runs import (
    VAL_IMAGES,
    diagnose_run,
    find,
    finish,
    make_bench,
    make_images,
    make_network,
    make_run,
    read_report,
)
from vpns.config import PromptConfig, RunConfig
from vpns.data import ImageSet
from vpns.files import write_text
from vpns.metrics import MetricsLog
from vpns.report import write_report
from vpns.report.diagnosis import diagnose
from vpns.report.facts import read_facts
from vpns.report.pairs import accuracy_error


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_images(VAL_IMAGES)


def test_slower_than_dense_fails_and_says_which_layers_cost(tmp_path: Path, images: ImageSet) -> None:
    bench = make_bench(make_network(32, speedup=0.8, low=0.7), make_network(224))
    finding = diagnose_run(tmp_path, images, "speedup over dense, 32", bench=bench)
    assert (finding["verdict"], finding["value"], finding["limit"]) == ("failed", 0.8, 1.0)
    for part in (
        "4 of 4 layers stayed dense",
        "conv1 1.00 ms",
        "moving activations",
        "outside the pruned layers",
    ):
        assert part in finding["cause"]
    write_report(tmp_path, images)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**slower, 0.80x as fast** (torch bfloat16)" in text
    assert "**0.80x (0.70 to 0.88): slower**" in text
    assert find(read_report(tmp_path / "report"), "speedup over dense, 224")["verdict"] == "ok"


def test_a_gain_that_may_be_chance_is_unclear(tmp_path: Path, images: ImageSet) -> None:
    bench = make_bench(make_network(32, speedup=1.1, low=0.97))
    assert diagnose_run(tmp_path, images, "speedup", bench=bench)["verdict"] == "unclear"


@pytest.mark.parametrize(
    ("trained", "cause"),
    [(98.0, "does not carry over"), (80.0, "has learned less (80.0%"), (None, "no epoch")],
)
def test_accuracy_drop_beyond_the_limit_fails_with_its_cause(
    tmp_path: Path, images: ImageSet, trained: float | None, cause: str
) -> None:
    folder = make_run(tmp_path, prompted_wrong=slice(20, 120))
    rows = [row for row in MetricsLog(folder).rows() if trained is not None or row["stage"] != "tune"]
    if trained is not None:
        rows[-1]["train_accuracy"] = trained
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (finding,) = [f for f in diagnose(read_facts(folder, images)) if f.name.startswith("accuracy drop")]
    assert (finding.verdict, finding.limit) == ("failed", 1.5)
    assert finding.value == pytest.approx(3.0)
    assert cause in finding.cause


def test_validation_far_below_training_is_put_down_to_batch_norm(tmp_path: Path, images: ImageSet) -> None:
    folder = make_run(tmp_path, prompted_wrong=slice(0, 1800))
    result = read_facts(folder, images).result("tune") | {"val_accuracy": 10.0}
    finish(folder, "tune", **result)
    (finding,) = [f for f in diagnose(read_facts(folder, images)) if f.name.startswith("accuracy drop")]
    assert "batch norm lag behind the pruned network after only 16 updates" in finding.cause


def test_prompt_that_harms_fails_where_it_is_applied(tmp_path: Path, images: ImageSet) -> None:
    finding = diagnose_run(tmp_path, images, "accuracy gained", prompted_wrong=slice(20, 200))
    assert finding["verdict"] == "failed"
    assert finding["value"] == pytest.approx(-5.0)
    assert "prompt.at_inference=false" in finding["cause"]


def test_prompt_that_would_help_is_named_where_it_is_left_out(tmp_path: Path, images: ImageSet) -> None:
    config = RunConfig(pattern="block:2x2", prompt=PromptConfig(variant="released"))
    finding = diagnose_run(tmp_path, images, "accuracy gained", config=config)
    assert finding["verdict"] == "ok"
    assert "prompt.at_inference=true" in finding["cause"]
    drop = diagnose_run(tmp_path, images, "accuracy drop", config=config)
    assert drop["value"] == pytest.approx(2.0)


def test_prompt_whose_gain_may_be_chance_is_unclear(tmp_path: Path, images: ImageSet) -> None:
    finding = diagnose_run(tmp_path, images, "accuracy gained", prompted_wrong=slice(22, 101))
    assert (finding["verdict"], finding["value"]) == ("unclear", pytest.approx(0.05))


def test_emptied_layer_fails_by_name(tmp_path: Path, images: ImageSet) -> None:
    finding = diagnose_run(tmp_path, images, "layers that the mask empties", emptied="layer1.0.conv2")
    assert (finding["verdict"], finding["value"]) == ("failed", 1.0)
    assert "layer1.0.conv2" in finding["cause"]


@pytest.mark.parametrize(
    ("changed", "verdict"), [(0.0, "failed"), (0.001, "failed"), (0.003, "ok"), (None, "absent")]
)
def test_search_that_changed_nothing_fails(
    tmp_path: Path, images: ImageSet, changed: float | None, verdict: str
) -> None:
    finding = diagnose_run(tmp_path, images, "share of mask entries", mask_changed_frac=changed)
    assert (finding["verdict"], finding["limit"]) == (verdict, pytest.approx(0.002))


@pytest.mark.parametrize(("kept", "verdict"), [(39, "ok"), (41, "ok"), (38, "failed"), (50, "failed")])
def test_density_may_be_off_by_one_unit(tmp_path: Path, images: ImageSet, kept: int, verdict: str) -> None:
    finding = diagnose_run(tmp_path, images, "kept share of units", kept_of_conv1=kept)
    assert (finding["verdict"], finding["value"]) == (verdict, pytest.approx((kept - 40) / 1000))


@pytest.mark.parametrize(("count", "verdict"), [(1000, "ok"), (300, "unclear"), (100, "failed")])
def test_small_validation_set_cannot_tell_the_difference(tmp_path: Path, count: int, verdict: str) -> None:
    finding = diagnose_run(tmp_path, make_images(count), "standard error of validation")
    assert finding["verdict"] == verdict
    assert finding["value"] == pytest.approx(accuracy_error(96.0, count))
