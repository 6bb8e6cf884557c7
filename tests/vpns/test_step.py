"""Does one update move what its stage trains, and nothing else?"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from vpns.batches import Batch, Pass, count_iterations, derive_seed, iterate_epoch, iterate_split
from vpns.config import DataConfig, PromptConfig, RunConfig, SearchConfig, StageConfig
from vpns.data import Split
from vpns.label_map import LabelMap
from vpns.masking import attach_masks, refresh, unit_scores
from vpns.methods import METHODS, Start
from vpns.optimizers import build_optimizer, learning_rate_frac, load_optimizer, optimizer_tensors
from vpns.predictor import Predictor
from vpns.prompt import build_prompt
from vpns.stages.networks import changing_tensors, is_prompted_at_inference, stage_passes
from vpns.stages.search import find_phase
from vpns.step import Learner, predict_logits, train_step
from vpns_kernels.convert import mask_modules
from vpns_kernels.patterns import parse_pattern
from vpns_kernels.refresh import refresh_mask

DENSITY = 0.3
PROMPT = PromptConfig(canvas=16, frame=2)


def make_learner(tiny_task: ModuleType, spec: str = "unstructured", density: float = DENSITY) -> Learner:
    torch.manual_seed(0)
    plain, pattern = tiny_task.build(12), parse_pattern(spec)
    scores = METHODS["vpns"].start_scores(Start(plain, None, pattern, 0))
    network, prompt = attach_masks(plain, pattern, scores), build_prompt(PROMPT)
    learned = [module.scores for module in mask_modules(network).values()]
    optimizer = build_optimizer(SearchConfig(lr=1e-2), learned, prompt.parameters())

    def follow_scores() -> None:
        refresh(network, pattern, density, "exact")

    follow_scores()
    return Learner(Predictor(prompt, network), LabelMap(torch.arange(10)), optimizer, follow_scores)


def make_batch_of(prompted: bool, count: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 12, 12, generator=generator)
    return Batch(images, torch.arange(count) % 10, prompted)


def snapshot(learner: Learner) -> dict[str, Tensor]:
    state = dict(learner.predictor.network.state_dict()) | {"prompt.raw": learner.predictor.prompt.raw}
    return {name: tensor.detach().clone() for name, tensor in state.items()}  # type: ignore[union-attr]


def moved_by_a_step(learner: Learner, batch: Batch) -> set[str]:
    before = snapshot(learner)
    train_step(learner, [batch])
    after = snapshot(learner)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("spec", ["unstructured", "block:4x4", "channel"])
def test_a_search_step_moves_scores_masks_statistics_and_prompt_but_no_weight(
    tiny_task: ModuleType, spec: str
) -> None:
    learner = make_learner(tiny_task, spec, density=0.5)
    learner.predictor.network.train()
    moved = moved_by_a_step(learner, make_batch_of(prompted=True))
    kinds = {name.rpartition(".")[2] for name in moved}
    assert {"scores", "raw", "running_mean", "running_var", "num_batches_tracked"} <= kinds
    assert kinds <= {"scores", "mask", "raw", "running_mean", "running_var", "num_batches_tracked"}
    for module in mask_modules(learner.predictor.network).values():
        # Pruned units get their gradient too, so that they can return.
        assert module.scores.grad is not None
        assert bool(module.scores.grad[~module.mask].any()) or bool(module.mask.all())


def test_a_plain_batch_teaches_the_prompt_nothing(tiny_task: ModuleType) -> None:
    learner = make_learner(tiny_task)
    learner.predictor.network.train()
    train_step(learner, [make_batch_of(prompted=True)])
    assert "prompt.raw" not in moved_by_a_step(learner, make_batch_of(prompted=False))


def test_the_mask_keeps_exactly_its_count_after_every_step(tiny_task: ModuleType) -> None:
    learner = make_learner(tiny_task)
    learner.predictor.network.train()
    units = sum(module.scores.numel() for module in mask_modules(learner.predictor.network).values())
    seen = set()
    for _ in range(5):
        train_step(learner, [make_batch_of(prompted=True)])
        masks = [module.mask for module in mask_modules(learner.predictor.network).values()]
        assert sum(int(mask.sum()) for mask in masks) == int(DENSITY * units + 0.5)
        seen.add(tuple(torch.cat([mask.flatten() for mask in masks]).tolist()))
    assert len(seen) > 1


def test_a_step_returns_the_loss_and_the_right_images_before_it(tiny_task: ModuleType) -> None:
    learner = make_learner(tiny_task)
    learner.predictor.network.eval()
    batch = make_batch_of(prompted=True)
    logits = predict_logits(learner.predictor, learner.label_map, [batch])
    loss, right = train_step(learner, [batch])
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, batch.labels)))
    assert right == int((logits.argmax(1) == batch.labels).sum())


@pytest.mark.parametrize("parts", [2, 3, 10, 99])
def test_accumulated_parts_make_the_update_of_the_whole_batch(tiny_task: ModuleType, parts: int) -> None:
    batch, found = make_batch_of(prompted=True), []
    for split in (batch.split(parts), [batch]):
        learner = make_learner(tiny_task, "block:4x4")
        # Batch norm by the batch's own statistics would see each part by itself.
        learner.predictor.eval()
        found.append((*train_step(learner, split), snapshot(learner)))
    (loss, right, state), (whole_loss, whole_right, whole) = found
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert right == whole_right
    for name, tensor in whole.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_loss_that_is_not_finite_stops_before_anything_moves(tiny_task: ModuleType) -> None:
    learner = make_learner(tiny_task)
    learner.predictor.network.eval()
    with torch.no_grad():
        learner.predictor.network.fc.bias[0] = float("nan")  # type: ignore[union-attr, operator, index]
    before = snapshot(learner)
    with pytest.raises(FloatingPointError, match="expected finite loss, got nan"):
        train_step(learner, [make_batch_of(prompted=True)])
    after = snapshot(learner)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
    with pytest.raises(FloatingPointError, match="expected finite logits"):
        predict_logits(learner.predictor, learner.label_map, [make_batch_of(True)])


def test_hydra_starts_at_the_scaled_weights_with_their_sign(tiny_task: ModuleType) -> None:
    network = tiny_task.build(12)
    scores = METHODS["hydra"].start_scores(Start(network, None, parse_pattern("unstructured"), 0))
    weight = network.conv2.weight
    torch.testing.assert_close(scores["conv2"], (6 / 72) ** 0.5 * weight / weight.abs().max())
    assert list(scores) == ["conv1", "conv2", "fc"]


def test_blocks_start_by_the_rank_of_their_mean_magnitude_and_ragged_ones_too(tiny_task: ModuleType) -> None:
    network = tiny_task.build(12)
    scores = unit_scores(network, parse_pattern("block:5x8"), torch.abs)["conv2"]
    magnitude = network.conv2.weight.detach().abs()
    assert scores.shape == (2, 1, 3, 3)
    means = torch.stack([magnitude[:5].mean((0, 1)), magnitude[5:].mean((0, 1))])
    assert torch.equal(scores.flatten().argsort(), means.flatten().argsort())
    torch.testing.assert_close(scores.flatten().sort().values, (torch.arange(18) + 0.5) / 18)


def test_every_layer_starts_with_its_share_of_the_blocks(tiny_task: ModuleType) -> None:
    network, pattern = tiny_task.build(12), parse_pattern("block:2x2")
    with torch.no_grad():
        network.conv1.weight.mul_(100)
    scores = list(unit_scores(network, pattern, torch.abs).values())
    for tensor, mask in zip(scores, refresh_mask(scores, pattern, 0.25).masks, strict=True):
        assert abs(int(mask.sum()) - 0.25 * tensor.numel()) <= 1


def test_streams_of_channels_start_by_rank(tiny_task: ModuleType) -> None:
    scores = unit_scores(tiny_task.build(12), parse_pattern("channel"), torch.abs)
    # One stream, of the first convolution and the residual add.
    assert list(scores) == ["channel_mask_0"]
    torch.testing.assert_close(scores["channel_mask_0"].sort().values, (torch.arange(8) + 0.5) / 8)


def test_magnitude_ranks_by_the_fine_tuned_network_and_random_by_the_seed(tiny_task: ModuleType) -> None:
    pretrained, fine_tuned, pattern = tiny_task.build(12), tiny_task.build(12), parse_pattern("unstructured")
    start = Start(pretrained, fine_tuned, pattern, seed=5)
    assert torch.equal(METHODS["omp"].start_scores(start)["fc"], fine_tuned.fc.weight.abs())
    drawn = METHODS["random"].start_scores(start)
    assert torch.equal(drawn["fc"], METHODS["random"].start_scores(start)["fc"])
    assert not torch.equal(
        drawn["fc"], METHODS["random"].start_scores(Start(pretrained, None, pattern, 6))["fc"]
    )


def test_learning_rates_follow_their_schedules() -> None:
    assert [learning_rate_frac("cosine", e, 4) for e in range(4)] == pytest.approx(
        [1, 0.85355339, 0.5, 0.14644661]
    )
    assert [learning_rate_frac("multistep", e, 100) for e in (0, 49, 50, 71, 72, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    # Where the shares are no whole epochs the published milestones are rounded down.
    drops = {
        epochs: [learning_rate_frac("multistep", e, epochs) for e in range(epochs)] for epochs in (5, 30)
    }
    assert [[rates.index(pytest.approx(rate)) for rate in (0.1, 0.01)] for rates in drops.values()] == [
        [2, 3],
        [15, 21],
    ]
    assert learning_rate_frac("constant", 3, 4) == 1


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_optimizer_steps_as_torch_does_whatever_the_order_in_memory(kind: str) -> None:
    settings = StageConfig(optimizer=kind, lr=0.1, weight_decay=0.01)  # type: ignore[arg-type]
    start, found = torch.randn(4, 3, 2, 2), []
    grads = torch.randn(3, 4, 3, 2, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(start.clone(memory_format=memory_format))
        optimizer = build_optimizer(settings, [parameter])
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
        found.append(parameter.detach())
    plain = nn.Parameter(start.clone())
    own = {"lr": 0.1, "weight_decay": 0.01, "foreach": False}
    rival = (
        torch.optim.Adam([plain], **own)  # type: ignore[arg-type]
        if kind == "adam"
        else torch.optim.SGD([plain], momentum=settings.momentum, **own)  # type: ignore[arg-type]
    )
    for grad in grads:
        plain.grad = grad.clone()
        rival.step()
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], plain.detach())
    # By its version others know that a tensor changed.
    assert parameter._version >= len(grads)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_optimizer_goes_on_from_its_saved_tensors_bitwise(kind: str) -> None:
    weights = [torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last) for _ in range(2)]
    grads = torch.randn(3, 4, 3, 2, 2)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, grad: Tensor) -> None:
        parameter.grad = grad.clone()
        optimizer.step()

    settings = StageConfig(optimizer=kind, lr=0.1)  # type: ignore[arg-type]
    whole = nn.Parameter(weights[0].clone())
    optimizer = build_optimizer(settings, [whole])
    step(whole, optimizer, grads[0])
    step(whole, optimizer, grads[1])
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, {"w": whole}).items()}
    resumed = nn.Parameter(whole.detach().clone())
    fresh = build_optimizer(settings, [resumed])
    load_optimizer(fresh, {"w": resumed}, saved)
    step(whole, optimizer, grads[2])
    step(resumed, fresh, grads[2])
    assert torch.equal(whole, resumed)


def test_an_epoch_shows_every_image_once_in_each_pass_in_orders_of_their_own() -> None:
    split = Split(
        (torch.arange(25, dtype=torch.uint8)).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4), torch.arange(25)
    )
    passes = (Pass(True, False), Pass(False, False))
    seen: list[list[int]] = [[], []]
    sizes = []
    for batches in iterate_epoch(split, passes, ("tune", 0, 0), 8, 4, DataConfig(), seed=1):
        for number, batch in enumerate(batches):
            assert batch.prompted == passes[number].prompted
            assert torch.equal((batch.images[:, 0, 0, 0] * 255).round().long(), batch.labels)
            seen[number] += batch.labels.tolist()
        sizes.append(len(batches[0].labels))
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(25))
    assert seen[0] != seen[1]
    # 3 batches of 8 and one of a single image would stop batch norm.
    assert sizes == [7, 6, 6, 6]
    assert count_iterations(split, 8) == 4


def test_an_epoch_begun_in_its_middle_goes_on_with_the_same_images() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split, passes, data = Split(pixels, torch.arange(20)), (Pass(True, True),), DataConfig(flip=True)
    whole = list(iterate_epoch(split, passes, ("tune", 3, 0), 5, 8, data, seed=1))
    rest = list(iterate_epoch(split, passes, ("tune", 3, 2), 5, 8, data, seed=1))
    assert len(rest) == 2
    for (ours,), (theirs,) in zip(rest, whole[2:], strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    other = next(iterate_epoch(split, passes, ("tune", 4, 2), 5, 8, data, seed=1))
    assert not torch.equal(other[0].images, rest[0][0].images)


def test_a_split_is_shown_whole_and_in_order() -> None:
    split = Split(torch.zeros(7, 3, 8, 8, dtype=torch.uint8), torch.arange(7))
    batches = list(iterate_split(split, 4, prompted=True, batch_size=3))
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches[0].images.shape == (3, 3, 4, 4)


def test_seeds_of_different_purposes_differ() -> None:
    seeds = {derive_seed(7, *parts) for parts in (("a", 1), ("a", 2), ("b", 1), ("a", "1", 1), ())}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("prompt_in", "search", "tune"),
    [("both", True, True), ("search", True, False), ("tune", False, True), ("none", False, False)],
)
def test_a_stage_without_the_prompt_shows_plain_images(prompt_in: str, search: bool, tune: bool) -> None:
    config = RunConfig(
        prompt=PromptConfig(prompt_in=prompt_in),  # type: ignore[arg-type]
        search=SearchConfig(passes=2),
    )
    assert stage_passes(config, "search") == (Pass(search, True), Pass(False, True))
    assert stage_passes(config, "tune") == (Pass(tune, True),)


def test_the_released_variant_shows_a_prompted_batch_as_at_test_time_and_a_plain_augmented_one() -> None:
    released = RunConfig(prompt=PromptConfig(variant="released"))
    for stage in ("search", "tune"):
        assert stage_passes(released, stage) == (Pass(True, False), Pass(False, True))
    assert not is_prompted_at_inference(released)
    assert is_prompted_at_inference(RunConfig())


def test_schedules_train_jointly_or_one_half_after_the_other() -> None:
    def trained(schedule: str) -> list[tuple[bool, bool, bool]]:
        phases = [find_phase(schedule, epoch, 3) for epoch in range(3)]
        return [(phase.trains_scores, phase.trains_prompt, phase.is_prompted) for phase in phases]

    assert trained("joint") == [(True, True, True)] * 3
    assert trained("mask_then_prompt") == [(True, False, False), (False, True, True), (False, True, True)]
    assert trained("prompt_then_mask") == [(False, True, True), (True, False, True), (True, False, True)]
    assert [find_phase("mask_then_prompt", e, 3).epoch for e in range(3)] == [0, 0, 1]


def test_changing_tensors_are_what_learns_and_the_buffers_of_the_state(tiny_task: ModuleType) -> None:
    learner = make_learner(tiny_task)
    names = changing_tensors(("network.", learner.predictor.network), ("prompt.", learner.predictor.prompt))
    assert "prompt.raw" in names
    assert "prompt.mean" not in names
    assert {name for name in names if name.startswith("network.conv1")} == {
        "network.conv1.scores",
        "network.conv1.mask",
    }
    assert names["network.bn1.running_mean"] is learner.predictor.network.bn1.running_mean  # type: ignore[union-attr]
