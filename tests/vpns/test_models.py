"""Are the networks torchvision's in keys, sizes and outputs, and is only a fitting file of weights let in?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

from vpns.config import ModelConfig
from vpns.models import MODELS, build_model, find_head, load_weights, replace_head

PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "vgg16": 138_357_544, "vgg16_bn": 138_365_992}


class Tiny(nn.Module):
    """A network of a few weights with a batch norm and a head."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.classifier = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.bn(self.conv(x)).mean((2, 3)))
        return out


def build_on_meta(name: str, num_classes: int = 1000) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name](num_classes)


def equal_states(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Architectures


def test_every_architecture_is_in_the_registry() -> None:
    assert MODELS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_torchvisions(name: str) -> None:
    assert sum(parameter.numel() for parameter in build_on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "entries", "shapes"),
    [
        (
            "resnet18",
            122,
            {"layer4.1.conv2.weight": (512, 512, 3, 3), "layer2.0.downsample.0.weight": (128, 64, 1, 1)},
        ),
        (
            "resnet50",
            320,
            {"layer1.0.downsample.1.running_var": (256,), "layer4.2.conv3.weight": (2048, 512, 1, 1)},
        ),
        ("vgg16", 32, {"features.28.bias": (512,), "classifier.0.weight": (4096, 25088)}),
        ("vgg16_bn", 97, {"features.41.running_mean": (512,), "classifier.6.weight": (1000, 4096)}),
    ],
)
def test_state_dict_keys_are_torchvisions(
    name: str, entries: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    state = build_on_meta(name).state_dict()
    assert len(state) == entries
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("size", [32, 45, 224])
def test_any_size_from_32_up_gives_one_logit_per_class(name: str, size: int) -> None:
    images = torch.empty(2, 3, size, size, device="meta")
    assert build_on_meta(name, 7).eval()(images).shape == (2, 7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_can_be_traced_symbolically(name: str) -> None:
    traced = fx.symbolic_trace(build_on_meta(name, 7).eval())
    assert traced(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_can_be_exported_with_any_batch(name: str) -> None:
    images = torch.empty(2, 3, 32, 32, device="meta")
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(build_on_meta(name, 7).eval(), (images,), dynamic_shapes=shapes)
    assert program.module()(images[:1].expand(5, -1, -1, -1)).shape == (5, 7)


def test_resnet18_computes_what_its_state_dict_says() -> None:
    """Against the architecture written once more from the names of its weights alone."""
    model = build_model(ModelConfig(), 7, seed=3).double()
    images = torch.rand(2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(images)  # One step in training mode, so that the running statistics are not those of the start.
    model.eval()
    state = model.state_dict()

    def unit(x: Tensor, conv: str, norm: str, stride: int) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = F.max_pool2d(unit(images, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if f"{name}.downsample.0.weight" in state:
                shortcut = unit(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = unit(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            x = (unit(x, f"{name}.conv2", f"{name}.bn2", 1) + shortcut).relu()
    expected = x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first = build_model(ModelConfig(), 7, seed=3)
    torch.rand(10)
    again, other = build_model(ModelConfig(), 7, seed=3), build_model(ModelConfig(), 7, seed=4)
    assert equal_states(first, again)
    assert not equal_states(first, other)
    torch.set_rng_state(state)
    build_model(ModelConfig(), 7, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'module:factory', got 'resnet19' .* did you mean resnet1\d.*\?"):
        build_model(ModelConfig(name="resnet19"), 7, seed=3)


# module:factory


def test_a_factory_in_the_current_folder_is_called_with_the_class_count(folder: Path) -> None:
    (folder / "own_layers.py").write_text("from torch import nn\nConv = nn.Conv2d\n")
    (folder / "own_net.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    from own_layers import Conv\n"
        "    return nn.Sequential(Conv(3, 4, 3), nn.Flatten(), nn.Linear(144, num_classes))\n"
    )
    path = list(sys.path)
    model = build_model(ModelConfig(name="own_net:make"), 9, seed=3)
    assert find_head(model)[1].out_features == 9
    assert sys.path == path
    assert equal_states(model, build_model(ModelConfig(name="own_net:make"), 9, seed=3))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "no_such:make",
            ValueError,
            "expected a module that imports, got 'no_such:make' .*No module named 'no_such'",
        ),
        ("needy:make", ValueError, "got 'needy:make' .*No module named 'no_such_dependency'"),
        ("bad_net:gone", ValueError, "expected a callable 'gone' in 'bad_net', got no such attribute"),
        ("bad_net:number", ValueError, "expected a callable 'number' in 'bad_net', got int"),
        ("bad_net:", ValueError, "expected a callable '' in 'bad_net', got no such attribute"),
        (":make", ValueError, "expected 'module:factory', got ':make'"),
        (".relative:make", ValueError, "expected 'module:factory', got '.relative:make'"),
        ("bad_net:text", ValueError, "expected 'bad_net:text' to return a torch.nn.Module, got str"),
        ("bad_net:empty", ValueError, "expected a model with Conv2d or Linear layers, got 'bad_net:empty'"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(
    folder: Path, name: str, error: type[Exception], message: str
) -> None:
    (folder / "needy.py").write_text("import no_such_dependency\n")
    (folder / "bad_net.py").write_text(
        "from torch import nn\n"
        "number = 3\n"
        "def text(num_classes):\n    return 'a network'\n"
        "def empty(num_classes):\n    return nn.Sequential(nn.ReLU())\n"
    )
    with pytest.raises(error, match=message):
        build_model(ModelConfig(name=name), 9, seed=3)


# The head


def test_the_head_is_the_last_linear_layer() -> None:
    assert find_head(Tiny())[0] == "classifier.2"
    assert find_head(build_on_meta("vgg16"))[0] == "classifier.6"
    assert find_head(nn.Linear(3, 2))[0] == ""


def test_a_new_head_replaces_the_last_linear_layer_and_nothing_else() -> None:
    model = Tiny().double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert replace_head(model, 3, seed=1) is model
    assert find_head(model)[1].weight.dtype == torch.float64
    assert model.eval()(torch.rand(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 3)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"classifier.2.weight", "classifier.2.bias"}


def test_a_new_head_depends_on_the_seed_alone() -> None:
    first, again, other = (find_head(replace_head(Tiny(), 3, seed))[1].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_head_without_bias_stays_without_and_a_lone_head_is_replaced_whole() -> None:
    head = replace_head(nn.Linear(4, 5, bias=False), 3, seed=1)
    assert isinstance(head, nn.Linear)
    assert head.bias is None
    assert head.weight.shape == (3, 4)


def test_a_model_without_linear_layers_has_no_head() -> None:
    with pytest.raises(ValueError, match=r"expected a model with a torch.nn.Linear, got Conv2d"):
        replace_head(nn.Conv2d(3, 4, 1), 3, seed=1)


# Weights


@pytest.fixture
def trained() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_weights_are_read_from_files(trained: Tiny, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save(trained.state_dict(), path)
    model = Tiny()
    load_weights(model, path)
    assert equal_states(model, trained)


@pytest.mark.parametrize("names", [["tune/weights.safetensors"], ["pretrain/weights.safetensors"]])
def test_weights_are_read_from_a_run_folder(trained: Tiny, tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir()
        save_file(trained.state_dict(), tmp_path / name)
    model = Tiny()
    load_weights(model, str(tmp_path))
    assert equal_states(model, trained)


def test_a_run_folder_gives_its_final_weights_first(trained: Tiny, tmp_path: Path) -> None:
    for stage, network in (("pretrain", Tiny()), ("dense", Tiny()), ("tune", trained)):
        (tmp_path / stage).mkdir()
        save_file(network.state_dict(), tmp_path / stage / "weights.safetensors")
    model = Tiny()
    load_weights(model, tmp_path)
    assert equal_states(model, trained)


@pytest.mark.parametrize("stage", ["dense", "search"])
def test_a_run_that_is_under_way_has_no_weights_to_give(trained: Tiny, tmp_path: Path, stage: str) -> None:
    path = tmp_path / "pretrain" / "weights.safetensors"
    path.parent.mkdir()
    save_file(trained.state_dict(), path)
    (tmp_path / stage).mkdir()
    with pytest.raises(FileNotFoundError, match=f"which has not tuned .*or name {path}"):
        load_weights(Tiny(), tmp_path)
    load_weights(Tiny(), path)


def test_build_model_takes_the_weights_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    trained = build_model(ModelConfig(), 7, seed=3)
    save_file(trained.state_dict(), path)
    assert equal_states(build_model(ModelConfig(weights=str(path)), 7, seed=4), trained)


def test_a_file_without_batch_counters_is_read(trained: Tiny, tmp_path: Path) -> None:
    state = trained.state_dict()
    del state["bn.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth")
    model = Tiny()
    load_weights(model, tmp_path / "w.pth")
    assert equal_states(model, trained)


def test_a_head_of_another_class_count_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save_file(Tiny(1000).state_dict(), tmp_path / "w.safetensors")
    model = Tiny(52)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"head of 52 classes, got one of 1000 in {tmp_path}.*source_classes=1000"
    ):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_shapes_are_refused_by_key_with_both_shapes(trained: Tiny, tmp_path: Path) -> None:
    state = trained.state_dict() | {"conv.weight": torch.zeros(4, 3, 5, 5)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"conv\.weight \[4, 3, 3, 3\] \(file: \[4, 3, 5, 5\]\)"):
        load_weights(Tiny(), tmp_path / "w.safetensors")


def test_missing_and_unknown_keys_are_refused_by_name(trained: Tiny, tmp_path: Path) -> None:
    state = trained.state_dict() | {"extra": torch.zeros(1)}
    del state["conv.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"without conv\.bias and with unknown extra"):
        load_weights(Tiny(), tmp_path / "w.safetensors")


def test_long_lists_of_keys_are_abbreviated(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"without bn1\.bias, .* and 94 more and with unknown other$"):
        load_weights(build_on_meta("resnet18"), tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}", b"x" * 500])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"expected a readable weight file, got {tmp_path / name}"):
        load_weights(Tiny(), tmp_path / name)


class Hostile:
    """Unpickled without care, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"conv.weight": Hostile(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected a readable weight file"):
        load_weights(Tiny(), tmp_path / "w.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"conv.weight": torch.zeros(1)}}, torch.zeros(3)])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"expected a state dict .* \(save model\.state_dict\(\) alone\)"):
        load_weights(Tiny(), tmp_path / "w.pth")


def test_absent_files_and_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"got {tmp_path / 'gone.pth'}"):
        load_weights(Tiny(), tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match=f"in the run folder, got {tmp_path}"):
        load_weights(Tiny(), tmp_path)
    (tmp_path / "w.onnx").touch()
    with pytest.raises(
        ValueError, match=f"expected a .safetensors, .pth or .pt file, got {tmp_path / 'w.onnx'}"
    ):
        load_weights(Tiny(), tmp_path / "w.onnx")


# torchvision


def fake_torchvision(state: dict[str, Tensor], error: OSError | None = None) -> dict[str, ModuleType]:
    """What fetch_state uses of torchvision, with one architecture and one set of weights."""

    class Weights:
        def get_state_dict(self, progress: bool, check_hash: bool) -> dict[str, Tensor]:
            assert check_hash
            if error is not None:
                raise error
            return state

    models = ModuleType("torchvision.models")
    models.list_models = lambda module: ["resnet18"]
    models.get_model_weights = lambda name: SimpleNamespace(__members__={"IMAGENET1K_V1": Weights()})
    return {"torchvision": ModuleType("torchvision"), "torchvision.models": models}


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_torchvisions_weights_are_fetched_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = build_model(ModelConfig(), 7, seed=3)
    install(monkeypatch, fake_torchvision(trained.state_dict()))
    model = build_model(ModelConfig(weights="torchvision:IMAGENET1K_V1"), 7, seed=4)
    assert equal_states(model, trained)


def test_unknown_names_of_torchvision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_torchvision({}))
    with pytest.raises(ValueError, match=r"one of \['IMAGENET1K_V1'\] for resnet18, got 'BEST'"):
        build_model(ModelConfig(weights="torchvision:BEST"), 7, seed=3)
    with pytest.raises(ValueError, match="expected an architecture of torchvision, got 'own:net'"):
        load_weights(Tiny(), "torchvision:BEST", "own:net")


def test_without_torchvision_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        NotImplementedError, match=r"expected torchvision to be installed.*pip install torchvision"
    ):
        build_model(ModelConfig(weights="torchvision:IMAGENET1K_V1"), 7, seed=3)


def test_a_failed_download_names_what_it_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_torchvision({}, OSError("no route")))
    with pytest.raises(
        ConnectionError, match=r"download IMAGENET1K_V1 of resnet18, got no route .*takes a file"
    ):
        build_model(ModelConfig(weights="torchvision:IMAGENET1K_V1"), 7, seed=3)


def test_a_torchvision_built_for_cuda_imports_on_a_cpu_only_torch(tmp_path: Path) -> None:
    """In a process of its own, since operators stay declared: the stand-in fails as the real one does."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def nms(dets, scores, iou_threshold): ...\n"
    )
    (package / "models.py").write_text("def list_models(module):\n    return ['reached']\n")
    code = "from vpns.models.published import fetch_torchvision_state as fetch; fetch('resnet18', 'X')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ValueError: fetch_state: expected an architecture of torchvision, got 'resnet18'" in done.stderr


def test_importing_models_imports_no_torchvision() -> None:
    code = (
        "import sys, vpns.models, vpns.data; assert not {'torchvision', 'timm', 'sklearn'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
