"""Does the doctor say what is there, what is not, and why?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vpns import cli, doctor
from vpns.doctor import Finding, examine, is_healthy
from vpns_kernels import native
from vpns_kernels.choose import Machine
from vpns_kernels.ops import OPS

Capture = pytest.CaptureFixture[str]


def test_every_op_and_every_usable_instruction_set_is_named() -> None:
    found = {finding.name: finding for finding in examine()}
    assert all(f"op {name}" in found for name in OPS)
    usable = {
        name.removeprefix("cpu ") for name, f in found.items() if name.startswith("cpu ") and f.is_there
    }
    assert usable == set(native.library().isa_list())
    named = " ".join(finding.detail for finding in found.values())
    assert all(kernel in named for kernel in native.library().sparse_conv2d_kernels())
    assert found["compiled library"].is_there
    assert "ms" in found["expect block:32x32 float32"].detail
    assert re.search(r"up to density [01]\.\d\d$", found["expect block:32x32 float32"].detail)
    assert all(found[name].is_there for name in ("torchvision", "timm"))


def test_a_missing_gpu_part_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_no_cuda", lambda: "the library's GPU part is missing (no nvcc)")
    monkeypatch.setenv("PATH", "")
    found = {finding.name: finding for finding in examine()}
    assert not found["gpu part of the library"].is_there
    assert "no nvcc" in found["gpu part of the library"].detail
    assert "not built" in found["nvcc"].detail
    assert is_healthy(list(found.values()))


def test_a_missing_compiled_library_makes_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "the compiled library is missing (build it)")
    assert cli.main(["doctor"]) == cli.EXIT_ERROR
    assert "build it" in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["is_healthy"]
    assert printed["findings"][0]["name"] == "cpu"


def test_a_torchvision_that_does_not_import_and_a_full_cache_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(part: str) -> None:
        raise RuntimeError("operator torchvision::roi_align does not exist")

    monkeypatch.setattr(doctor, "import_torchvision", fails)
    monkeypatch.setenv("VPNS_CACHE", str(tmp_path / "new" / "cache"))
    found = {finding.name: finding for finding in examine()}
    assert not found["torchvision"].is_there
    assert "roi_align" in found["torchvision"].detail
    assert re.match(rf"{tmp_path}/new/cache, \d+ GiB free", found["cache of images"].detail)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "cannot be written" in {finding.name: finding for finding in examine()}["cache of images"].detail
    assert is_healthy(list(found.values()))


def test_cores_whose_costs_were_never_measured_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "this_machine", lambda: Machine("avx512", 2, lambda query: [], "intel6.106"))
    found = {finding.name: finding for finding in examine()}["costs of layers"]
    assert not found.is_there
    assert "none of avx512 intel6.106" in found.detail
    monkeypatch.setattr(doctor, "this_machine", lambda: Machine("avx512", 2, lambda query: [], "amd25"))
    assert {finding.name: finding for finding in examine()}["costs of layers"].is_there


def test_only_what_is_needed_decides() -> None:
    assert is_healthy([Finding("gpu", False, "none")])
    assert not is_healthy([Finding("compiled library", False, "missing", is_needed=True)])


def test_an_unknown_option_is_refused(capsys: Capture) -> None:
    assert cli.main(["doctor", "--yaml"]) == cli.EXIT_ERROR
    assert "yaml" in capsys.readouterr().err


def test_a_gpu_is_described_and_what_is_expected_there(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H200", total_memory=141 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = {finding.name: finding for finding in examine()}
    assert found["gpu"].detail.startswith("H200, 141 GiB, compute capability 9.0")
    assert found["gpu 2:4"].is_there
    assert "kernels of" in found["triton"].detail
    assert "sparse_conv2d" in found["triton"].detail
    expected = found["expect block:32x32 bfloat16 on the gpu"]
    assert expected.is_there
    assert "no costs were measured on this GPU" in expected.detail
    assert not found["expect unstructured bfloat16 on the gpu"].is_there


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_triton_version", lambda: None)
    finding = next(one for one in examine() if one.name == "triton")
    assert (finding.is_there, finding.detail) == (False, "not installed (extra [triton])")
