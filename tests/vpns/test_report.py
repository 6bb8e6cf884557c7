"""Does a report say what the run found, and stand on its own?"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.vpns.report_runs import (
    LAYERS,
    TEST_IMAGES,
    VAL_IMAGES,
    find,
    make_bench,
    make_images,
    make_network,
    make_run,
    read_report,
)
from vpns.config import RunConfig
from vpns.data import ImageSet
from vpns.files import write_json, write_text
from vpns.report import write_report
from vpns.report.facts import STAGES
from vpns.report.pairs import accuracy_error, compare, sign_test
from vpns.state import list_outputs
from vpns_kernels.measure import bench_network, fingerprint
from vpns_kernels.patterns import Unstructured

JSON_KEYS = {
    "schema_version",
    "dense_accuracy",
    "sparse_accuracy",
    "sparse_accuracy_prompted",
    "density",
    "weight_density",
    "pattern",
    "dense_ms",
    "dense_engine",
    "dense_dtype",
    "sparse_ms",
    "speedup",
    "diagnosis",
    "versions",
    "cpu",
    "commit",
    "method",
    "seed",
    "seconds",
    "updates",
    "images_seen",
    "test_images",
    "networks",
}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_images(VAL_IMAGES)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> Path:
    """The report's folder of a run in which all is well."""
    folder = make_run(tmp_path_factory.mktemp("good") / "run")
    write_report(folder, images)
    return folder / "report"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_json_has_the_promised_keys_and_carries_the_numbers_of_the_run(report: Path) -> None:
    content = read_report(report)
    assert set(content) >= JSON_KEYS
    assert content["schema_version"] == 1
    assert content["dense_accuracy"] == pytest.approx(98.0)
    assert content["sparse_accuracy"] == pytest.approx(96.0)
    assert content["sparse_accuracy_prompted"] == pytest.approx(98.5)
    assert (content["density"], content["unit_density"]) == (0.1, 0.1)
    assert content["weight_density"] == pytest.approx(
        (40 * 4 + 30 * 4 + 20 * 4 + 10) / (100 * 4 + 400 * 4 + 500)
    )
    assert (content["dense_ms"], content["dense_engine"], content["dense_dtype"]) == (
        8.0,
        "torch",
        "bfloat16",
    )
    assert (content["sparse_ms"], content["speedup"]) == (4.0, 2.0)
    assert (content["packed_bytes"], content["dense_bytes"] > 10_000) == (1000, True)
    assert content["seconds"] == dict.fromkeys(("pretrain", "dense", "search", "tune"), 4.0)
    assert content["updates"]["search"] == 16
    assert (content["cpu"], content["commit"], content["dirty"]) == ("Test CPU", "abc123", False)
    assert content["versions"]["torch"] == "2.13.0"
    assert [network["image_size"] for network in content["networks"]] == [32, 224]


def test_all_checks_of_a_good_run_are_ok(report: Path) -> None:
    verdicts = {row["name"]: row["verdict"] for row in read_report(report)["diagnosis"]}
    assert set(verdicts.values()) == {"ok"}, verdicts
    assert "All is well." in (report / "report.md").read_text()


def test_pairs_count_the_images_that_only_one_network_gets_right(report: Path) -> None:
    pairs = {(row["first"], row["second"]): row for row in read_report(report)["pairs"]}
    pair = pairs["dense", "sparse"]
    counts = [pair[key] for key in ("only_first", "only_second", "both_right", "both_wrong")]
    assert counts == [60, 20, TEST_IMAGES - 100, 20]
    assert pair["difference"] == pytest.approx(-2.0)
    assert pairs["dense", "sparse, prompted"]["difference"] == pytest.approx(0.5)
    assert pairs["sparse", "sparse, prompted"]["difference"] == pytest.approx(2.5)


def test_paired_error_is_the_spread_of_resampled_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(1000, generator=generator) < 0.9
    second = torch.where(torch.rand(1000, generator=generator) < 0.9, first, ~first)
    pair = compare("a", first, "b", second)
    drawn = torch.randint(0, 1000, (4000, 1000), generator=generator)
    spread = 100 * (second[drawn].double().mean(1) - first[drawn].double().mean(1)).std()
    assert pair.standard_error == pytest.approx(float(spread), rel=0.05)


def test_sign_test_agrees_with_counted_cases_and_takes_large_counts() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert 0 < sign_test(24_000, 25_000) < 1e-4


def test_accuracy_of_few_images_is_not_certain_even_if_all_are_right() -> None:
    assert accuracy_error(100.0, 5) > 10
    assert accuracy_error(90.0, 10_000) == pytest.approx(0.3, rel=0.01)


def test_tables_hold_the_rows_of_the_run(report: Path) -> None:
    curves = read_rows(report / "curves.csv")
    assert len(curves) == 32
    assert curves[0]["stage"] == "pretrain"
    assert [row["layer"] for row in read_rows(report / "density.csv")] == list(LAYERS)
    layers = read_rows(report / "layers.csv")
    assert [row["image_size"] for row in layers] == ["32"] * 4 + ["224"] * 4
    assert layers[0]["reason"] == "block_avx2 wins | here"
    engines = [row["engine"] for row in read_rows(report / "engines.csv")]
    assert engines == ["torch bfloat16", "torch float32", "sparse"] * 2
    assert len(read_rows(report / "diagnosis.csv")) == len(read_report(report)["diagnosis"])


def test_every_plot_is_a_picture_with_something_on_it(report: Path) -> None:
    for name in ("curves.png", "prompt.png", "density.png", "times.png"):
        with Image.open(report / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
            assert colors is not None
            assert len(colors) > 20


def test_every_link_of_the_text_resolves(report: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (report / "report.md").read_text())
    assert len(links) >= 8
    assert [link for link in links if not (report / link).is_file()] == []


def test_every_table_of_the_text_has_equal_rows(report: Path) -> None:
    for block in (report / "report.md").read_text().split("\n\n"):
        if block.startswith("|"):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1, block


def test_text_leads_with_the_result(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert text.index("## Result") < text.index("## Diagnosis") < text.index("## Training")
    assert "98.50% of 2,000 test images right (with prompt), dense 98.00% (+0.50 points)" in text
    assert "at 32 px 2.00x as fast (torch bfloat16)" in text
    assert "| layer1.0.conv1 | 64→64 3x3 @8x8 |" in text


def test_written_config_is_that_of_the_run_with_its_threads(report: Path) -> None:
    config = RunConfig.from_dict(yaml.safe_load((report / "config.yaml").read_text()))
    assert config == replace(RunConfig(pattern="block:2x2"), threads=2)


def test_command_of_the_text_parses_to_the_run(
    tmp_path: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpns.cli import parse

    monkeypatch.chdir(tmp_path)
    write_report(make_run(Path("a run")), images)
    text = Path("a run/report/report.md").read_text()
    (command,) = re.findall(r"```\n(.*)\n```", text)
    assert command == "vpns run 'a run-again' --config 'a run/report/config.yaml'"
    config = parse(["run", "a run-again", "--config", "a run/report/config.yaml"]).config
    assert config == replace(RunConfig(pattern="block:2x2"), threads=2)


def test_a_second_report_is_equal_to_the_last_byte(report: Path, images: ImageSet) -> None:
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    write_report(report.parent, images)
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before


def test_every_file_of_the_report_counts_as_an_output(report: Path) -> None:
    assert set(list_outputs(report)) == {path.name for path in report.iterdir()}


def test_images_are_loaded_where_none_are_given(tmp_path: Path) -> None:
    write_report(make_run(tmp_path / "run"))
    assert read_report(tmp_path / "run" / "report")["val_images"] == 339


def test_run_without_prompt_has_no_picture_of_it(tmp_path: Path, images: ImageSet) -> None:
    write_report(make_run(tmp_path, RunConfig(method="omp", pattern="block:2x2")), images)
    content = read_report(tmp_path / "report")
    assert content["sparse_accuracy_prompted"] is None
    assert [find(content, name)["verdict"] for name in ("accuracy gained", "share of mask")] == ["absent"] * 2
    assert not (tmp_path / "report" / "prompt.png").exists()
    assert "prompt.png" not in (tmp_path / "report" / "report.md").read_text()


def test_run_that_trained_no_epoch_has_no_curves(tmp_path: Path, images: ImageSet) -> None:
    folder = make_run(tmp_path)
    write_text(folder / "metrics.jsonl", "")
    write_report(folder, images)
    assert not (folder / "report" / "curves.png").exists()
    assert "curves.png" not in (folder / "report" / "report.md").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_missing_stage_is_named_with_its_command(tmp_path: Path, images: ImageSet, stage: str) -> None:
    folder = make_run(tmp_path)
    (folder / stage / "stage.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"'{stage}' .*vpns {stage} {folder}"):
        write_report(folder, images)
    assert not (folder / "report").exists()


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "content", [{"schema_version": 2, "networks": [{}]}, {"schema_version": 1, "networks": []}]
)
def test_timings_of_another_form_are_refused(
    tmp_path: Path, images: ImageSet, content: dict[str, Any]
) -> None:
    folder = make_run(tmp_path, bench=content)
    with pytest.raises(ValueError, match=r"bench\.json"):
        write_report(folder, images)


def test_planted_timings_have_the_form_of_real_ones() -> None:
    conv = torch.nn.Conv2d(3, 4, 3)
    network = torch.nn.Sequential(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with torch.no_grad():
        conv.weight.mul_(torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5)
    real = bench_network(network.eval(), Unstructured(), torch.ones(2, 3, 8, 8), rounds=1)
    planted = make_network(32)
    assert planted.keys() == real.keys()
    assert planted["layers"][0].keys() == real["layers"][0].keys()
    assert planted["dense"]["torch float32"].keys() == real["dense"]["torch float32"].keys()
    assert make_bench()["machine"].keys() == fingerprint().keys()


def test_report_holds_strict_json(report: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((report / "report.json").read_text(), parse_constant=refuse)


def test_the_report_tells_who_computed_which_passes(tmp_path: Path, images: ImageSet) -> None:
    folder = make_run(tmp_path)
    layers = {"conv1": {"backends": ["cpu"] * 3}, "fc": {"backends": ["cpu", "cpu", "reference"]}}
    write_json(folder / "search" / "choice.json", {"schema_version": 1, "layers": layers})
    write_report(folder, images)
    text = (folder / "report" / "report.md").read_text()
    assert "of 2 masked layers the sparse kernels computed the forward in 2, input gradient in 2" in text
    assert "weight gradient in 1" in text
    assert "Stage tune ran on torch's dense layers." in text
