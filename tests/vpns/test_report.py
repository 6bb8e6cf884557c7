"""Does a report say what the run found, name what went wrong, and stand on its own?"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from vpns.config import PromptConfig, RunConfig
from vpns.data import ImageSet, Split
from vpns.files import make_folder, read_json, write_json, write_tensors, write_text
from vpns.metrics import MetricsLog
from vpns.observe import EpochMetrics
from vpns.report import write_report
from vpns.report.diagnosis import diagnose
from vpns.report.facts import STAGES, read_facts
from vpns.report.pairs import accuracy_error, compare, sign_test
from vpns.state import StageRecord, finish_stage, list_outputs
from vpns_kernels.measure import bench_network, fingerprint
from vpns_kernels.patterns import Unstructured

CLASSES, TEST_IMAGES, VAL_IMAGES = 10, 2000, 1500
# Of a layer: its unit mask's shape, weights per unit, and how many units stay; a tenth of 1,000 in all.
LAYERS = {
    "conv1": ((100,), 4, 40),
    "layer1.0.conv1": ((20, 10), 4, 30),
    "layer1.0.conv2": ((20, 10), 4, 20),
    "fc": ((50, 10), 1, 10),
}
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


def make_images(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % CLASSES)
    return ImageSet(split, split, split, tuple(map(str, range(CLASSES))))


def make_logits(labels: Tensor, wrong: slice) -> Tensor:
    """Right everywhere but on a stretch of the images."""
    predicted = labels.clone()
    predicted[wrong] = (predicted[wrong] + 1) % CLASSES
    return torch.nn.functional.one_hot(predicted, CLASSES).float()


def make_network(image_size: int, speedup: float = 2.0, low: float = 1.8) -> dict[str, Any]:
    """Timings as vpns_kernels.measure.bench_network gives them."""
    dense_ms = 8.0
    layers = [
        {
            "layer": name,
            "shape": f"64→64 3x3 @{image_size // 4} /1",
            "pattern": "block:2x2",
            "density": kept / torch.Size(shape).numel(),
            "dense_ms": 1.0,
            "dense_dtype": "bfloat16",
            "sparse_ms": 1.0 / speedup,
            "speedup": speedup,
            "choice": "sparse" if speedup > 1 else "dense",
            "kernel": "block_avx2" if speedup > 1 else "torch",
            "reason": "block_avx2 wins | here" if speedup > 1 else "moving activations costs more",
            "flops": 1000,
            "share": 0.2,
        }
        for name, (shape, _, kept) in LAYERS.items()
    ]
    return {
        "image_size": image_size,
        "batch": 16,
        "dense": {
            "torch float32": {"median_ms": 12.0, "p20_ms": 11.0, "p80_ms": 13.0, "rounds": 15},
            "torch bfloat16": {"median_ms": dense_ms, "p20_ms": 7.5, "p80_ms": 8.5, "rounds": 15},
        },
        "best_dense": "torch bfloat16",
        "dense_ms": dense_ms,
        "dense_dtype": "bfloat16",
        "sparse_ms": dense_ms / speedup,
        "sparse_dtype": "float32",
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": speedup * 1.1,
        "max_rel_err": 0.001,
        "sparse_flops_frac": 0.75,
        "layers": layers,
    }


def make_bench(*networks: dict[str, Any]) -> dict[str, Any]:
    machine = {
        "cpu": "Test CPU",
        "cores": 2,
        "isa": ["scalar", "avx2"],
        "threads": 2,
        "python": "3.11.0",
        "versions": {"torch": "2.13.0", "numpy": "2.0.0", "vpns": "0.1.0"},
        "date": "2025-01-01",
        "commit": "abc123",
        "dirty": False,
    }
    return {"schema_version": 1, "machine": machine, "networks": list(networks)}


def finish(folder: Path, stage: str, **result: Any) -> None:
    make_folder(folder / stage)
    finish_stage(folder / stage, StageRecord(result, list_outputs(folder / stage), {}))


def make_run(
    folder: Path,
    config: RunConfig | None = None,
    *,
    dense_wrong: slice = slice(0, 40),
    sparse_wrong: slice = slice(20, 100),
    prompted_wrong: slice = slice(20, 50),
    bench: dict[str, Any] | None = None,
    emptied: str | None = None,
    mask_changed_frac: float | None = 0.05,
    kept_of_conv1: int = 40,
) -> Path:
    """A run folder in which every stage but the report has finished, with planted outcomes."""
    config = config or RunConfig(pattern="block:2x2")
    has_prompt = config.method == "vpns" and config.prompt.kind != "none"
    make_folder(folder)
    write_json(
        folder / "run.json",
        {"schema_version": 1, "config": config.to_dict(), "threads": 2, "versions": {"torch": "2.13.0"}},
    )
    log = MetricsLog(folder)
    for stage in ("pretrain", "dense", "search", "tune"):
        for epoch in range(1, 9):
            values = (2 / epoch, 90 + epoch, 88 + epoch, 0.1, 2 * epoch, 100 * epoch, 0.5 * epoch)
            log.append(EpochMetrics(stage, epoch, 2 * epoch, *values))
    trained = {"val_accuracy": 96.0, "best_epoch": 8, "updates": 16, "images_seen": 800, "seconds": 4.0}
    finish(folder, "pretrain", source="letters", **trained)
    make_folder(folder / "dense")
    write_tensors(folder / "dense" / "weights.safetensors", {"weight": torch.zeros(2500)})
    finish(folder, "dense", label_map=None, **trained)

    masks: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, (shape, weights, kept) in LAYERS.items():
        kept = 0 if name == emptied else kept_of_conv1 if name == "conv1" else kept
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.flatten()[:kept] = True
        masks[name] = mask
        count = mask.numel() * weights
        share = {"kept": kept * weights, "weight_density": kept / mask.numel()}
        rows.append({"layer": name, "shape": [*shape, weights], "weights": count, **share})
    density = sum(row["kept"] for row in rows) / sum(row["weights"] for row in rows)
    found: dict[str, Any] = {"density": config.density, "weight_density": density, "layers": rows}
    found |= {"label_map": None, "threshold": 0.01, "ties_kept": 0, "kept": 100}
    if mask_changed_frac is not None:
        found["mask_changed_frac"] = mask_changed_frac
    finish(folder, "search", **found, **trained)

    make_folder(folder / "tune")
    canvas = config.prompt.canvas
    raw = torch.linspace(-2, 2, 3 * canvas * canvas).reshape(3, canvas, canvas)
    write_tensors(folder / "tune" / "masks.safetensors", masks)
    write_tensors(folder / "tune" / "prompt.safetensors", {"raw": raw} if has_prompt else {})
    finish(folder, "tune", **trained)

    labels = torch.arange(TEST_IMAGES) % CLASSES
    outputs = {"dense_logits": make_logits(labels, dense_wrong), "logits": make_logits(labels, sparse_wrong)}
    if has_prompt:
        outputs["logits_prompted"] = make_logits(labels, prompted_wrong)
    accuracy = {k: 100 * float((v.argmax(1) == labels).double().mean()) for k, v in outputs.items()}
    make_folder(folder / "eval")
    write_tensors(folder / "eval" / "outputs.safetensors", outputs | {"labels": labels})
    is_prompted = has_prompt and config.prompt.variant == "framed"
    finish(
        folder,
        "eval",
        dense_accuracy=accuracy["dense_logits"],
        sparse_accuracy=accuracy["logits"],
        sparse_accuracy_prompted=accuracy.get("logits_prompted"),
        accuracy=accuracy["logits_prompted" if is_prompted else "logits"],
        is_prompted=is_prompted,
        test_images=TEST_IMAGES,
        class_names=list(map(str, range(CLASSES))),
    )
    make_folder(folder / "export" / "artifact")
    for name in ("plan.bin", "manifest.json"):
        write_text(folder / "export" / "artifact" / name, "0" * 500)
    finish(folder, "export")
    make_folder(folder / "bench")
    timings = make_bench(make_network(32), make_network(224)) if bench is None else bench
    write_json(folder / "bench" / "bench.json", timings)
    finish(folder, "bench")
    return folder


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return make_images(VAL_IMAGES)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> Path:
    """The report's folder of a run in which all is well."""
    folder = make_run(tmp_path_factory.mktemp("good") / "run")
    write_report(folder, images)
    return folder / "report"


def read_report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(folder / "report.json")
    return content


def find(report: dict[str, Any], name: str) -> dict[str, Any]:
    """The one finding whose name begins so."""
    (finding,) = [row for row in report["diagnosis"] if row["name"].startswith(name)]
    return dict(finding)


def diagnose_run(folder: Path, images: ImageSet, name: str, **planted: Any) -> dict[str, Any]:
    findings = diagnose(read_facts(make_run(folder, **planted), images))
    return find({"diagnosis": [asdict(finding) for finding in findings]}, name)


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
    assert "| layer1.0.conv1 | 64→64 3x3 @8 /1 |" in text


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
    masks = {"0": torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5}
    with torch.no_grad():
        conv.weight.mul_(masks["0"])
    real = bench_network(network.eval(), masks, Unstructured(), torch.ones(2, 3, 8, 8), rounds=1)
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
