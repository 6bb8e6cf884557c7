"""What does a user see when something is wrong? One line that says what; what was done stays."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vpns.cli import main

CLASSES = ("cat", "dog", "owl")
# A run of half a second.
TINY = (
    "--data.name=folder", "--data.root=photos", "--model.name=tiny_task:build", "--model.source_classes=12",
    "--prompt.canvas=16", "--prompt.frame=2", "--pattern=unstructured", "--density=0.3",
    "--pretrain.epochs=0", "--search.epochs=1", "--search.batch_size=10", "--tune.epochs=1",
    "--tune.batch_size=10", "--threads=1",
)  # fmt: skip
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_task: ModuleType) -> Path:
    """A current folder with an image folder in it."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = noise.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path


@pytest.fixture
def begun(capsys: Capture) -> dict[str, str]:
    """A run whose search has finished, in the folder "run"; digests of what it holds."""
    assert main(["search", "run", *TINY]) == 0
    capsys.readouterr()
    return digests()


def digests() -> dict[str, str]:
    """Of the finished stages' files."""
    files = [
        path for stage in ("pretrain", "search") for path in Path("run", stage).rglob("*") if path.is_file()
    ]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def expect_error(capsys: Capture, arguments: list[str], *parts: str) -> None:
    """The command fails with one line, which holds these parts."""
    code = main(arguments)
    check_error(code, capsys.readouterr().err, *parts)


def check_error(code: int, err: str, *parts: str) -> None:
    assert code == 2
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, err
    assert errors[0].startswith("vpns: error: ")
    for part in parts:
        assert part in errors[0]


def expect_to_go_on(capsys: Capture) -> None:
    """The same command, without the trouble, ends well."""
    assert main(["eval", "run"]) == 0, capsys.readouterr().err
    assert Path("run/eval/outputs.safetensors").is_file()


# Settings


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--density=0"], ("density", "(0, 1]", "got 0")),
        (["--density=1.5"], ("density", "(0, 1]", "got 1.5")),
        (["--density=.nan"], ("density", "(0, 1]", "got nan")),
        (["--density=much"], ("density", "float", "much")),
        (["--prompt.frame=8"], ("frame", "canvas=16", "got frame=8")),
        (["--prompt.frame=-1"], ("frame", "got frame=-1")),
        (["--pattern=stripes"], ("pattern", "unstructured", "got 'stripes'")),
        (["--pattern=block:0x4"], ("Block", "got 0x4")),
        (["--pattern=nm:2:4", "--density=0.3"], ("0.5", "got", "0.3")),
        (["--method=guess"], ("method", "vpns", "got 'guess'")),
        (["--prompt.kind=border"], ("prompt.kind", "pad", "got 'border'")),
        (["--model.source_classes=2"], ("at most 2 target classes", "got 3", "label_map.kind=head")),
        (["--data.root=fotos"], ("image folder", "got fotos")),
        (["--data.name=photos"], ("data.name", "folder", "got 'photos'")),
        (["--model.name=resnet19"], ("model.name", "resnet18", "got 'resnet19'")),
        (["--device=abacus"], ("device", "'abacus'")),
        (["--search.optimizer=lion"], ("optimizer", "adam", "lion")),
        (["--tune.epochs=-1"], ("epochs", "got -1")),
        (["--sparsity=0.9"], ("--sparsity",)),
        (["--config=absent.yaml"], ("absent.yaml",)),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_any_work(
    options: list[str], parts: tuple[str, ...], capsys: Capture
) -> None:
    expect_error(capsys, ["run", "run", *TINY, *options], *parts)
    assert not Path("run/pretrain/stage.json").exists()


def test_a_mistyped_setting_does_not_spoil_the_folder_for_the_command_as_it_was_meant(
    capsys: Capture,
) -> None:
    for wrong in ("--data.root=fotos", "--model.name=tiny_task:make"):
        assert main(["pretrain", "run", *TINY, wrong]) == 2
    assert main(["pretrain", "run", *TINY]) == 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("denstiy: 0.1\n", "denstiy"),
        ("prompt:\n  frames: 3\n", "frames"),
        ("density: [\n", "expected YAML, got bad.yaml"),
        ("density: [\n", "line 2"),
        ("7\n", "7"),
    ],
)
def test_a_settings_file_that_cannot_be_read_is_refused(text: str, part: str, capsys: Capture) -> None:
    Path("bad.yaml").write_text(text)
    expect_error(capsys, ["run", "run", "--config=bad.yaml"], part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["walk", "run"], "walk"),
        (["run"], "run folder"),
        (["run", "a", "--run_folder=b"], "a and b"),
    ],
)
def test_a_command_that_is_not_one_is_refused(arguments: list[str], part: str, capsys: Capture) -> None:
    expect_error(capsys, arguments, part)


# Data


def test_an_image_folder_must_be_given(capsys: Capture) -> None:
    arguments = [option for option in TINY if "data.root" not in option]
    expect_error(capsys, ["run", "run", *arguments], "expected data.root", "got None")


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(
    "trouble", ["no folder", "a file", "one class", "an empty class", "not an image", "torn"]
)
def test_a_bad_image_folder_is_named_and_costs_nothing(
    trouble: str, begun: dict[str, str], capsys: Capture
) -> None:
    good = Path("photos").rename("kept")
    culprit = Path("photos")
    if trouble == "a file":
        culprit.write_text("not a folder")
    elif trouble != "no folder":
        shutil.copytree(good, culprit)
    if trouble == "one class":
        shutil.rmtree("photos/cat")
        shutil.rmtree("photos/dog")
    elif trouble == "an empty class":
        culprit = Path("photos/cat")
        shutil.rmtree(culprit)
        culprit.mkdir()
    elif trouble == "not an image":
        culprit = Path("photos/dog/3.png")
        culprit.write_text("a page of text")
    elif trouble == "torn":
        culprit = Path("photos/dog/3.png")
        culprit.write_bytes(culprit.read_bytes()[:300])
    expect_error(capsys, ["eval", "run"], "expected", "got", str(culprit))
    assert digests() == begun
    if Path("photos").is_dir():
        shutil.rmtree("photos")
    Path("photos").unlink(missing_ok=True)
    good.rename("photos")
    expect_to_go_on(capsys)


# Models


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (
            "def build(num_classes):\n    return nn.Linear(3 * 16 * 16, num_classes)",
            ("convolutions", "Linear"),
        ),
        ("def build(num_classes):\n    return nn.ReLU()", ("Conv2d or Linear", "got 'own:build'")),
        ("def build(num_classes):\n    return num_classes", ("torch.nn.Module", "got int")),
        ("def build():\n    return nn.Conv2d(3, 4, 3)", ("own:build", "num_classes")),
        ("def build(num_classes):\n    raise KeyError('layers')", ("own:build", "KeyError", "layers")),
        (
            "class Odd(nn.Conv2d):\n    def forward(self, x):\n        return self.wieght\n\n"
            "def build(num_classes):\n    return Odd(3, num_classes, 16)",
            ("images [N, 3, 16, 16]", "AttributeError", "wieght"),
        ),
        (
            "class Odd(nn.Conv2d):\n    pass\n\n"
            "def build(num_classes):\n    return nn.Sequential(Odd(3, num_classes, 16), nn.Flatten())",
            ("Conv2d and Linear themselves", "got Odd at '0'"),
        ),
        ("def build(num_classes):\n    return nn.Conv3d", ("torch.nn.Module", "got type")),
        ("def build(num_classes):\n    return nn.Conf2d(3, 4, 3)", ("own:build", "Conf2d")),
        ("build = 3", ("callable 'build'", "got int")),
        ("class build:\n    pass", ("own:build",)),
        ("def construct(num_classes):\n    pass", ("callable 'build'", "no such attribute")),
        ("def build(num_classes:\n", ("own:build", "own.py")),
        ("import nowhere_at_all", ("own:build", "nowhere_at_all")),
        ("from torch import no_such_thing", ("own:build", "no_such_thing")),
        ("raise RuntimeError('no licence')", ("own:build", "no licence")),
        (
            "def build(num_classes):\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())",
            ("images [N, 3, 16, 16]", "Sequential"),
        ),
        (
            "def build(num_classes):\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())",
            ("logits [2, 12]", "got [2, 784]"),
        ),
    ],
)
def test_a_factory_that_fails_or_builds_something_else_is_named(
    source: str, parts: tuple[str, ...], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "own", raising=False)
    Path("own.py").write_text(f"from torch import nn\n\n{source}\n")
    expect_error(capsys, ["run", "run", *TINY, "--model.name=own:build"], *parts)


def test_a_module_that_is_not_there_is_named(capsys: Capture) -> None:
    expect_error(
        capsys, ["run", "run", *TINY, "--model.name=nowhere:build"], "expected a module", "'nowhere:build'"
    )


@pytest.mark.parametrize(
    ("trouble", "parts"),
    [
        ("shape", ("model's shapes", "conv1.weight [8, 3, 3, 3]", "[8, 3, 5, 5]")),
        ("head", ("head of 12 classes", "got one of 5", "source_classes=5")),
        ("keys", ("keys", "conv2.weight")),
        ("torn", ("readable weight file", "own.safetensors")),
        ("absent", ("weight file", "own.safetensors")),
        ("suffix", (".safetensors, .pth", "own.bin")),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_difference(
    trouble: str, parts: tuple[str, ...], capsys: Capture, tiny_task: ModuleType
) -> None:
    path = Path("own.bin" if trouble == "suffix" else "own.safetensors")
    state = tiny_task.build(5 if trouble == "head" else 12).state_dict()
    if trouble == "shape":
        state["conv1.weight"] = torch.zeros(8, 3, 5, 5)
    if trouble == "keys":
        del state["conv2.weight"]
    if trouble != "absent":
        save_file(state, path)
    if trouble == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    expect_error(capsys, ["run", "run", *TINY, f"--model.weights={path}"], *parts)


# Training


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_found(capsys: Capture) -> None:
    options = [*TINY, "--tune.lr=1e30", "--tune.epochs=3", "--save_every_s=0"]
    assert main(["search", "run", *options]) == 0
    found = digests()
    capsys.readouterr()
    expect_error(capsys, ["tune", "run"], "tune, iteration", "expected finite", "got", "learning rate")
    assert digests() == found
    expect_error(capsys, ["tune", "run", "--tune.lr=1e-2"], "settings", "tune.lr", "another folder")
    retry = ["--tune.lr=1e-2", "--model.weights=run/pretrain/weights.safetensors"]
    assert main(["eval", "second", *TINY, *retry]) == 0


# The run folder


@pytest.mark.parametrize("trouble", ["flipped", "absent", "torn record", "old record"])
def test_a_damaged_finished_stage_is_named_and_can_be_made_again(
    trouble: str, begun: dict[str, str], capsys: Capture
) -> None:
    culprit = Path(
        "run/search/scores.safetensors" if trouble in ("flipped", "absent") else "run/search/stage.json"
    )
    content = bytearray(culprit.read_bytes())
    if trouble == "absent":
        culprit.unlink()
    elif trouble == "flipped":
        content[len(content) // 2] ^= 1
        culprit.write_bytes(content)
    elif trouble == "torn record":
        culprit.write_bytes(content[: len(content) // 2])
    else:
        culprit.write_text(culprit.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    expect_error(capsys, ["eval", "run"], "expected", "got", str(culprit))
    intact = {name: digest for name, digest in begun.items() if "search" not in name}
    assert intact.items() <= digests().items()
    shutil.rmtree("run/search")
    expect_to_go_on(capsys)
    outputs = {name: digest for name, digest in begun.items() if name.endswith("safetensors")}
    assert outputs.items() <= digests().items()


def test_other_settings_in_the_same_folder_are_refused_by_name(
    begun: dict[str, str], capsys: Capture
) -> None:
    expect_error(capsys, ["run", "run", "--density=0.5"], "settings", "for density", "another folder")
    expect_error(capsys, ["run", "run", *TINY, "--seed=8", "--tune.lr=0.1"], "tune.lr", "seed")
    assert digests() == begun
    expect_to_go_on(capsys)


def test_settings_on_disk_that_were_damaged_are_named(begun: dict[str, str], capsys: Capture) -> None:
    text = Path("run/run.json").read_text()
    Path("run/run.json").write_text(text[:100])
    expect_error(capsys, ["run", "run"], "expected JSON", "run.json")
    assert digests() == begun
    Path("run/run.json").write_text(text)
    expect_to_go_on(capsys)


def test_a_second_process_in_the_folder_is_refused(begun: dict[str, str], capsys: Capture) -> None:
    hold = """if True:
        import fcntl, sys
        with open("run/run.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            print(flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        expect_error(capsys, ["run", "run"], "run folder run", "another process")
        assert digests() == begun
        other.communicate()
    expect_to_go_on(capsys)


def test_a_run_folder_below_a_file_is_refused(capsys: Capture) -> None:
    Path("file").write_text("")
    expect_error(capsys, ["run", "file/run", *TINY], "cannot write", "file/run", "Not a directory")
    expect_error(capsys, ["run", "file", *TINY], "cannot write", "file", "exists")


# The disk


@contextmanager
def mount_tmpfs(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill_disk(filler: Path) -> None:
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def can_mount() -> bool:
    """Effective CAP_SYS_ADMIN, bit 21."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> 21 & 1)


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting a disk takes CAP_SYS_ADMIN")


@needs_mount
def test_a_read_only_run_folder_is_refused_and_goes_on_when_writable(
    begun: dict[str, str], capsys: Capture
) -> None:
    shutil.move("run", "kept")
    with mount_tmpfs(Path("run"), "size=16m"):
        shutil.copytree("kept", "run", dirs_exist_ok=True)
        remount(Path("run"), "ro")
        expect_error(capsys, ["eval", "run"], "cannot write", "run", "Read-only file system")
        assert digests() == begun
        remount(Path("run"), "rw")
        expect_to_go_on(capsys)


@needs_mount
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    begun: dict[str, str], capsys: Capture
) -> None:
    shutil.move("run", "kept")
    with mount_tmpfs(Path("run"), "size=16m"):
        shutil.copytree("kept", "run", dirs_exist_ok=True)
        filler = Path("run/filler")
        fill_disk(filler)
        expect_error(capsys, ["eval", "run"], "cannot write", "No space left on device")
        assert digests() == begun
        stops = 0
        # From room for a few more files each time to room for all.
        while main(["eval", "run"]) != 0:
            check_error(2, capsys.readouterr().err, "cannot write", "No space left on device")
            assert begun.items() <= digests().items()
            os.truncate(filler, filler.stat().st_size - 12 * 1024)
            stops += 1
        assert stops > 2
        filler.unlink()
        expect_to_go_on(capsys)


def test_a_file_that_may_not_grow_stops_the_run_which_goes_on_when_it_may(desk: Path) -> None:
    command = [sys.executable, "-m", "vpns", "eval", "run", *TINY]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": paths}
    for limit_bytes in (0, 4000):

        def forbid(limit_bytes: int = limit_bytes) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        stopped = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=forbid)
        check_error(stopped.returncode, stopped.stderr, "cannot write", "File too large")
        assert not list(desk.rglob("*.tmp"))
    whole = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
