"""Does each prompt put its pixels where they belong, and nowhere else, before normalisation?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vpns.config import PromptConfig
from vpns.prompt import PROMPTS, Prompt, build_prompt
from vpns.prompt.base import MEAN, STD

FRAMED = PromptConfig(canvas=12, frame=3)
RELEASED = PromptConfig(variant="released", canvas=12, frame=3)
NONE = PromptConfig(kind="none", canvas=12, frame=3)


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
    assert sorted(PROMPTS) == ["none", "pad"]


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


@pytest.mark.parametrize("config", [FRAMED, RELEASED])
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


@pytest.mark.parametrize("config", [FRAMED, RELEASED, NONE])
def test_channels_last_images_stay_so(config: PromptConfig) -> None:
    prompt = build_prompt(config)
    images = random_images(prompt)
    out = prompt(images.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, prompt(images))


@pytest.mark.parametrize("config", [FRAMED, RELEASED, NONE])
def test_no_images_give_no_canvases(config: PromptConfig) -> None:
    prompt = build_prompt(config)
    assert prompt(random_images(prompt, count=0)).shape == (0, 3, 12, 12)


@pytest.mark.parametrize("variant", ["framed", "released"])
def test_a_frame_that_does_not_fit_is_refused(variant: str) -> None:
    with pytest.raises(ValueError, match=r"2 \* frame < canvas=12.*frame=6"):
        build_prompt(PromptConfig(variant=variant, canvas=12, frame=6))


def test_unknown_kinds_and_variants_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt\.kind in \['none', 'pad'\], got 'spiral'"):
        build_prompt(PromptConfig(kind="spiral"))
    with pytest.raises(ValueError, match=r"prompt\.variant in \['framed', 'released'\], got 'open'"):
        build_prompt(PromptConfig(variant="open"))


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 12, 12), torch.zeros(3, 6, 6), torch.zeros(2, 3, 6, 6, dtype=torch.uint8)]
)
def test_images_of_another_size_or_type_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected float images \[N, 3, 6, 6\], got"):
        build_prompt(FRAMED)(images)
