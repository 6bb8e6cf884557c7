"""Does each prompt put its pixels where they belong, and nowhere else, before normalisation?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpns.config import PromptConfig
from vpns.prompt import PROMPTS, Prompt, build_prompt
from vpns.prompt.base import MEAN, STD
from vpns.prompt.patch import PatchPrompt, patch_side
from vpns_kernels.geometry import PromptGeometry

FRAMED = PromptConfig(canvas=12, frame=3)
RELEASED = PromptConfig(variant="released", canvas=12, frame=3)
NONE = PromptConfig(kind="none", canvas=12, frame=3)
FIX = PromptConfig(kind="fix", canvas=12, frame=3)
RANDOM = PromptConfig(kind="random", canvas=12, frame=3)
EXPAND = PromptConfig(kind="expand", variant="released", canvas=12, frame=3)
ALL = [FRAMED, RELEASED, NONE, FIX, RANDOM, EXPAND]


def random_images(prompt: Prompt, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, prompt.image_size, prompt.image_size, generator=generator)


def with_random_raw(config: PromptConfig) -> Prompt:
    prompt = build_prompt(config)
    with torch.no_grad():
        prompt.raw.copy_(torch.randn(prompt.raw.shape, generator=torch.Generator().manual_seed(2)))
    return prompt


def undo_normalisation(canvas: Tensor) -> Tensor:
    return canvas * torch.tensor(STD).reshape(3, 1, 1) + torch.tensor(MEAN).reshape(3, 1, 1)


def frame() -> Tensor:
    """Bool [12, 12], True on the outermost three pixels."""
    mask = torch.ones(12, 12, dtype=torch.bool)
    mask[3:9, 3:9] = False
    return mask


def test_the_kinds_are_in_the_registry() -> None:
    assert sorted(PROMPTS) == ["expand", "fix", "none", "pad", "random"]


def test_framed_puts_the_image_inside_and_the_sigmoid_around_it() -> None:
    prompt = with_random_raw(FRAMED)
    images = random_images(prompt)
    assert prompt.image_size == 6
    canvas = undo_normalisation(prompt(images))
    torch.testing.assert_close(canvas[:, :, 3:9, 3:9], images)
    expected = prompt.raw.sigmoid()[:, frame()].expand(4, -1, -1)
    torch.testing.assert_close(canvas[:, :, frame()], expected)


def test_the_frame_starts_half_way_between_black_and_white() -> None:
    prompt = build_prompt(FRAMED)
    canvas = undo_normalisation(prompt(random_images(prompt)))
    torch.testing.assert_close(canvas[:, :, frame()], torch.full((4, 3, 108), 0.5))


def test_framed_without_prompt_has_the_same_geometry_and_a_black_frame() -> None:
    prompt = with_random_raw(FRAMED)
    images = random_images(prompt)
    canvas = undo_normalisation(prompt(images, prompted=False))
    torch.testing.assert_close(canvas[:, :, 3:9, 3:9], images)
    torch.testing.assert_close(canvas[:, :, frame()], torch.zeros(4, 3, 108))


def test_released_adds_raw_to_the_border_and_clamps() -> None:
    prompt = with_random_raw(RELEASED)
    images = random_images(prompt)
    assert prompt.image_size == 12
    canvas = undo_normalisation(prompt(images))
    torch.testing.assert_close(canvas[:, :, 3:9, 3:9], images[:, :, 3:9, 3:9])
    expected = (images + prompt.raw)[:, :, frame()].clamp(0, 1)
    torch.testing.assert_close(canvas[:, :, frame()], expected)


def test_released_changes_nothing_at_its_start() -> None:
    prompt = build_prompt(RELEASED)
    images = random_images(prompt)
    assert torch.equal(prompt(images), prompt(images, prompted=False))


@pytest.mark.parametrize("config", [RELEASED, NONE])
def test_released_without_prompt_and_none_are_the_normalised_image(config: PromptConfig) -> None:
    prompt = build_prompt(config)
    images = random_images(prompt)
    torch.testing.assert_close(undo_normalisation(prompt(images, prompted=False)), images)
    torch.testing.assert_close(undo_normalisation(prompt(images, prompted=config is NONE)), images)


@pytest.mark.parametrize("config", [FRAMED, RELEASED])
def test_the_gradient_of_raw_is_zero_outside_its_region_alone(config: PromptConfig) -> None:
    prompt = build_prompt(config)
    weights = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(3)) + 0.1
    (prompt(random_images(prompt)) * weights).sum().backward()
    gradient = prompt.raw.grad
    assert gradient is not None
    assert (gradient[:, ~frame()] == 0).all()
    assert (gradient[:, frame()] > 0).all()


@pytest.mark.parametrize("config", [FRAMED, RELEASED])
def test_the_gradient_of_raw_is_the_one_of_finite_differences(config: PromptConfig) -> None:
    prompt = with_random_raw(config).double()
    images = random_images(prompt, count=2).double()

    def compose(raw: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(prompt, {"raw": raw}, (images,))
        return out[:, :, ::3, ::3]

    assert torch.autograd.gradcheck(compose, (prompt.raw.detach().requires_grad_(),))


def test_a_clamped_pixel_passes_no_gradient() -> None:
    prompt = build_prompt(RELEASED)
    with torch.no_grad():
        prompt.raw[:, 0, 0] = 2.0
        prompt.raw[:, 0, 1] = -2.0
    prompt(random_images(prompt)).sum().backward()
    assert (prompt.raw.grad[:, 0, :2] == 0).all()
    assert (prompt.raw.grad[:, 0, 2:] != 0).all()


def test_without_prompt_raw_has_no_gradient() -> None:
    prompt = build_prompt(FRAMED)
    assert not prompt(random_images(prompt), prompted=False).requires_grad


@pytest.mark.parametrize("config", [config for config in ALL if config is not NONE])
def test_raw_is_the_only_parameter_and_covers_the_canvas(config: PromptConfig) -> None:
    prompt = build_prompt(config)
    shapes = {name: parameter.shape for name, parameter in prompt.named_parameters()}
    assert shapes == {"raw": (3, 12, 12)}
    assert list(prompt.state_dict()) == ["raw"]
    assert prompt.raw.requires_grad


def test_a_frozen_prompt_acts_but_does_not_learn() -> None:
    prompt = build_prompt(PromptConfig(canvas=12, frame=3, frozen=True))
    images = random_images(prompt)
    assert not prompt.raw.requires_grad
    assert torch.equal(prompt(images), build_prompt(FRAMED)(images))


def test_none_has_no_parameters_and_no_state() -> None:
    prompt = build_prompt(NONE)
    assert list(prompt.parameters()) == []
    assert prompt.state_dict() == {}
    assert prompt.image_size == 12


def test_the_effective_prompt_is_a_picture_of_the_frame_with_nothing_inside() -> None:
    prompt = with_random_raw(FRAMED)
    picture = prompt.effective()
    assert picture.shape == (3, 12, 12)
    assert not picture.requires_grad
    assert (picture[:, ~frame()] == 0).all()
    assert torch.equal(picture[:, frame()], prompt.raw.detach().sigmoid()[:, frame()])


def test_the_effective_prompt_stays_between_black_and_white() -> None:
    picture = with_random_raw(RELEASED).effective()
    assert (picture[:, ~frame()] == 0).all()
    assert picture.min() == 0
    assert picture.max() == 1
    assert (build_prompt(NONE).effective() == 0).all()


@pytest.mark.parametrize("config", ALL)
def test_channels_last_images_stay_so(config: PromptConfig) -> None:
    prompt = build_prompt(config).eval()
    images = random_images(prompt)
    out = prompt(images.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, prompt(images))


@pytest.mark.parametrize("config", ALL)
def test_no_images_give_no_canvases(config: PromptConfig) -> None:
    prompt = build_prompt(config)
    assert prompt(random_images(prompt, count=0)).shape == (0, 3, 12, 12)


@pytest.mark.parametrize("variant", ["framed", "released"])
def test_a_frame_that_does_not_fit_is_refused(variant: str) -> None:
    with pytest.raises(ValueError, match=r"2 \* frame < canvas=12.*frame=6"):
        build_prompt(PromptConfig(variant=variant, canvas=12, frame=6))


def test_unknown_kinds_and_variants_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt\.kind in \['expand', .*\], got 'spiral'"):
        build_prompt(PromptConfig(kind="spiral"))
    with pytest.raises(ValueError, match=r"prompt\.variant in \['framed', 'released'\], got 'open'"):
        build_prompt(PromptConfig(variant="open"))


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 12, 12), torch.zeros(3, 6, 6), torch.zeros(2, 3, 6, 6, dtype=torch.uint8)]
)
def test_images_of_another_size_or_type_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected float images \[N, 3, 6, 6\], got"):
        build_prompt(FRAMED)(images)


# The published prompts once more, from the description of the authors' code, in float64.


def transcribe(config: PromptConfig, images: Tensor, raw: Tensor, place: tuple[int, int]) -> Tensor:
    """[N, 3, 12, 12], normalised."""
    side = 12
    mask = torch.zeros(3, side, side, dtype=torch.float64)
    added = torch.sigmoid(raw)
    if config.kind in ("fix", "random"):
        # As many pixels as the frame: 12 * 12 - 6 * 6 = 108, of which a square has 10 * 10.
        mask[:, place[0] : place[0] + 10, place[1] : place[1] + 10] = 1
    else:
        mask[:] = 1
        mask[:, 3:9, 3:9] = 0
        if config.kind == "expand" or config.variant == "framed":
            images = torch.nn.functional.pad(images, (3, 3, 3, 3))
        else:
            added = raw
    canvas = torch.clamp(images + added * mask, 0, 1)
    # As published: constants in float32.
    mean = torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).double().view(3, 1, 1)
    return (canvas - mean) / std


@pytest.mark.parametrize("config", [FRAMED, RELEASED, FIX, RANDOM, EXPAND])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_transcription(config: PromptConfig, training: bool) -> None:
    prompt = with_random_raw(config).double().train(training)
    images = random_images(prompt).double()
    weights = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    place = (0, 0)
    if config is RANDOM:
        place = (1, 1)
        if training:
            torch.manual_seed(11)
            place = tuple(torch.randint(2, (2,)).tolist())
    raw = prompt.raw.detach().clone().requires_grad_()
    expected = transcribe(config, images, raw, place)
    torch.manual_seed(11)
    out = prompt(images)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for result in (out, expected):
        (result * weights).sum().backward()
    torch.testing.assert_close(prompt.raw.grad, raw.grad, rtol=0, atol=1e-12)
    assert (raw.grad != 0).any()


@pytest.mark.parametrize(
    ("frame", "side"), [(16, 115), (32, 156), (48, 183), (64, 202), (80, 214), (96, 221)]
)
def test_squares_are_as_large_as_published_for_each_frame(frame: int, side: int) -> None:
    assert patch_side(PromptGeometry(224, frame)) == side
    assert build_prompt(PromptConfig(kind="fix", canvas=224, frame=frame)).learned == 3 * side**2


@pytest.mark.parametrize(("frame", "entries"), [(8, 20736), (16, 39936), (32, 73728), (64, 122880)])
def test_frames_have_as_many_entries_as_published(frame: int, entries: int) -> None:
    assert build_prompt(PromptConfig(variant="released", canvas=224, frame=frame)).learned == entries


def test_a_moving_square_is_drawn_for_each_batch_from_torchs_generator() -> None:
    prompt = build_prompt(PromptConfig(kind="random", canvas=40, frame=2))
    assert isinstance(prompt, PatchPrompt)
    images = torch.zeros(3, 3, 40, 40)

    def places(seed: int) -> list[tuple[int, int]]:
        torch.manual_seed(seed)
        found = []
        for _ in range(30):
            lit = prompt.compose(images, prompted=True)[:, 0] > 0
            assert (lit == lit[0]).all()
            assert lit[0].sum() == prompt.side**2
            top, left = lit[0].nonzero()[0].tolist()
            found.append((top, left))
        return found

    first = places(1)
    assert first == places(1)
    assert first != places(2)
    assert len(set(first)) > 20
    assert max(max(place) for place in first) < 40 - prompt.side
    # Without training it stands in the middle, and draws nothing.
    middle = (40 - prompt.side) // 2
    state = torch.get_rng_state()
    lit = prompt.eval().compose(images, prompted=True)[0, 0] > 0
    assert lit.nonzero()[0].tolist() == [middle, middle]
    assert torch.equal(torch.get_rng_state(), state)
    prompt.train()
    assert (prompt.effective()[0] > 0).nonzero()[0].tolist() == [middle, middle]
    assert prompt.training


def test_a_square_of_the_whole_canvas_has_one_place() -> None:
    prompt = PatchPrompt(12, 12, moves=True, frozen=False)
    assert (prompt.compose(torch.zeros(1, 3, 12, 12), prompted=True) == 0.5).all()


@pytest.mark.parametrize("config", [FIX, RANDOM])
def test_a_square_without_prompt_is_the_image(config: PromptConfig) -> None:
    prompt = with_random_raw(config)
    images = random_images(prompt)
    torch.testing.assert_close(undo_normalisation(prompt(images, prompted=False)), images)


@pytest.mark.parametrize("config", ALL)
def test_every_prompt_describes_itself(config: PromptConfig) -> None:
    words = build_prompt(config).describe()
    assert "12" in words
    assert words[-1] != "."
