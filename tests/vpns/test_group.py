"""Do processes that train together end with the same masks, and with what one process finds?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vpns.batches import Batch
from vpns.files import read_json, read_tensors, write_json
from vpns.group import ALONE, Group
from vpns.run import execute

HERE = Path(__file__).parent
# What each process runs: a run of its own part, after which it leaves its masks where the test finds them.
WORKER = """
import os, sys
from pathlib import Path
import tiny_task
import vpns.stages.search
from vpns.files import write_tensors
from vpns.run import execute
from vpns_kernels.convert import mask_modules

folder, left = Path(sys.argv[1]), Path(sys.argv[2])
write = vpns.stages.search._write

def write_and_leave(context, network, prompt, changing):
    write(context, network, prompt, changing)
    tensors = {"raw": prompt.raw}
    for name, module in mask_modules(network).items():
        tensors |= {f"{name}.mask": module.mask, f"{name}.scores": module.scores}
    write_tensors(left / f"rank{os.environ['RANK']}.safetensors", tensors)

vpns.stages.search._write = write_and_leave
execute(folder, tiny_task.make_config(pattern=sys.argv[3]), "tune")
"""


def launch(arguments: list[str], processes: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command + arguments, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run_together(tmp_path: Path, pattern: str = "unstructured") -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    process = launch([str(worker), str(tmp_path / "run"), str(tmp_path), pattern])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_masks_scores_and_prompt_are_equal_in_both_processes(tmp_path: Path, pattern: str) -> None:
    run_together(tmp_path, pattern)
    first, second = (read_tensors(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(bool(tensor.any()) for name, tensor in first.items() if name.endswith("mask"))
    assert read_json(tmp_path / "run" / "run.json")["processes"] == 2


def test_a_run_keeps_its_number_of_processes(tiny_task: ModuleType, tmp_path: Path) -> None:
    config = tiny_task.make_config()
    execute(tmp_path, config, "pretrain")
    begun = read_json(tmp_path / "run.json")
    write_json(tmp_path / "run.json", begun | {"processes": 2})
    with pytest.raises(ValueError, match=r"expected the 2 processes that .* was begun with, got 1"):
        execute(tmp_path, config, "search")


def test_a_share_is_a_part_of_the_batch_and_nobody_goes_without() -> None:
    batch = Batch(torch.arange(7.0), torch.arange(7), True)
    shares = [Group(rank, 3).share(batch).labels.tolist() for rank in range(3)]
    assert shares == [[0, 1, 2], [3, 4], [5, 6]]
    assert ALONE.share(batch) is batch
    with pytest.raises(
        ValueError, match="expected at least one image for each of 8 processes, got a batch of 7"
    ):
        Group(0, 8).share(batch)
