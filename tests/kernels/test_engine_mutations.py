"""Is a stored engine in which anything was changed refused, or valid: never a crash, never in silence?"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.kernels.artifacts import resign
from tests.kernels.test_engine import images
from tests.kernels.test_engine_torch import Attentive, compile_in_part
from tests.kernels.test_hostile_artifacts import mutate
from vpns_kernels import load
from vpns_kernels.engine import ArtifactError, read_artifact, save_engine

FILES = (
    "manifest.json", "plan.bin", "masks.safetensors", "weights.safetensors", "prompt.safetensors",
    "torch-0.pt2", "torch-1.pt2",
)  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    network = Attentive().eval()
    folder = tmp_path_factory.mktemp("mutations") / "engine"
    masks = {name: torch.ones(2, 3, dtype=torch.bool) for name in ("stem", "head")}
    prompt = {"raw": torch.zeros(3, 2, 2)}
    save_engine(
        compile_in_part(network, images(2)), folder, {"label": 1}, masks, network.state_dict(), prompt
    )
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "engine")
    return tmp_path / "engine"


def assert_refused(folder: Path, count: int, seed: int) -> None:
    """Whatever is changed, in any file, shows."""
    chance = random.Random(seed)
    for number in range(count):
        path = folder / FILES[number % len(FILES)]
        data = path.read_bytes()
        path.write_bytes(mutate(data, chance))
        with pytest.raises(ArtifactError):
            read_artifact(folder, verify="all")
        path.write_bytes(data)
    assert load(folder)(images(1)).shape == (1, 5)


def assert_refused_or_valid(folder: Path, count: int, seed: int) -> None:
    """With digests that are right again, what is accepted runs."""
    chance, refused = random.Random(seed), 0
    originals = {name: (folder / name).read_bytes() for name in ("manifest.json", "plan.bin", "torch-0.pt2")}
    for number in range(count):
        name = "torch-0.pt2" if number % 25 == 0 else "plan.bin"
        data = bytearray(originals[name])
        # A plan's tables, where most bits mean something, are its first part.
        place = chance.randrange(len(data) if name != "plan.bin" or number % 3 == 0 else len(data) // 3)
        data[place] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(data if chance.random() < 0.8 else mutate(bytes(data), chance))
        resign(folder)
        try:
            load(folder)(images(1))
        except (ArtifactError, RuntimeError):
            # RuntimeError: torch's, where its program is another one now.
            refused += 1
        for changed in (name, "manifest.json"):
            (folder / changed).write_bytes(originals[changed])
    assert count // 3 < refused < count


def test_none_of_900_mutations_is_accepted(folder: Path) -> None:
    assert_refused(folder, 900, 1)


def test_100_mutations_under_right_digests_are_refused_or_valid(folder: Path) -> None:
    assert_refused_or_valid(folder, 100, 2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3, 10))
def test_none_of_7000_more_mutations_is_accepted(folder: Path, seed: int) -> None:
    assert_refused(folder, 1000, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 13))
def test_3000_more_mutations_under_right_digests_are_refused_or_valid(folder: Path, seed: int) -> None:
    assert_refused_or_valid(folder, 1000, seed)
