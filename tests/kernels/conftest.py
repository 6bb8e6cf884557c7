"""What several files of tests are given: artifacts of their own to read, damage and replace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kernels.artifacts import write_sample


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    write_sample(folder / "whole")
    write_sample(folder / "small", small=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path, templates: Path) -> Path:
    shutil.copytree(templates / "whole", tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture
def small(tmp_path: Path, templates: Path) -> Path:
    shutil.copytree(templates / "small", tmp_path / "artifact")
    return tmp_path / "artifact"
