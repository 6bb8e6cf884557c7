"""Is what was found of a layout found anew once the layout is another, and not before?"""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from vpns_kernels.formats.layouts import LayoutCache


def find(cache: LayoutCache[list[int]], *layout: Tensor, key: object = None) -> list[int]:
    return cache.get(layout, key, lambda: [number for array in layout for number in array.tolist()])


def test_a_layout_is_looked_at_once_for_each_key() -> None:
    cache: LayoutCache[list[int]] = LayoutCache()
    first, second = torch.tensor([1, 2]), torch.tensor([3])
    found = find(cache, first, second)
    assert find(cache, first, second) is found
    assert find(cache, first, second, key="other") is not found


def test_one_that_was_written_or_got_other_arrays_is_looked_at_again() -> None:
    cache: LayoutCache[list[int]] = LayoutCache()
    first, second, other = torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4])
    assert find(cache, first, second) == [1, 2, 3]
    assert find(cache, first, other) == [1, 2, 4]
    second.copy_(other)
    assert find(cache, first, second) == [1, 2, 4]
    first.data = torch.tensor([5, 6])
    assert find(cache, first, second) == [5, 6, 4]


def test_what_is_made_in_inference_mode_is_kept_by_its_place() -> None:
    cache: LayoutCache[list[int]] = LayoutCache()
    with torch.inference_mode():
        layout = torch.tensor([1, 2])
    assert find(cache, layout) is find(cache, layout)


def test_few_are_kept_and_none_longer_than_its_layout() -> None:
    cache: LayoutCache[list[int]] = LayoutCache()
    layout = torch.tensor([0])
    for _ in range(20):
        layout += 1
        find(cache, layout)
    (kept,) = cache._known.values()
    assert len(kept) == 8
    del layout
    gc.collect()
    assert not list(cache._known.values())
