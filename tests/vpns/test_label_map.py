"""Is each target class answered by the source class that the counts say, one to one and always the same?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vpns.label_map import LabelMap, count_predictions, frequency_map, identity_map


class Echo(nn.Module):
    """Says the source class that is written in the image; its modes and gradients are watched."""

    def __init__(self, source_classes: int) -> None:
        super().__init__()
        self.source_classes = source_classes
        self.norm = nn.BatchNorm1d(1)
        self.seen_training: list[bool] = []
        self.seen_grad: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen_training += [self.training, self.norm.training]
        self.seen_grad.append(torch.is_grad_enabled())
        self.norm(images.float())
        return nn.functional.one_hot(images[:, 0], self.source_classes).float()


def test_a_map_gathers_one_logit_per_target_class() -> None:
    logits = torch.arange(8.0).reshape(2, 4)
    mapped = LabelMap(torch.tensor([3, 0]))(logits)
    assert mapped.tolist() == [[3, 0], [7, 4]]


def test_a_map_without_sequence_passes_the_logits_on() -> None:
    logits = torch.rand(2, 4)
    assert LabelMap(None)(logits) is logits


def test_gradients_reach_the_mapped_logits_alone() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    LabelMap(torch.tensor([3, 0]))(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1, 0, 0, 1]]


def test_the_sequence_travels_with_the_state_dict() -> None:
    saved = LabelMap(torch.tensor([3, 0])).state_dict()
    other = LabelMap(torch.tensor([1, 2]))
    other.load_state_dict(saved)
    assert other.sequence is not None
    assert other.sequence.tolist() == [3, 0]
    assert LabelMap(None).state_dict() == {}


@pytest.mark.parametrize("sequence", [torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])])
def test_a_sequence_that_is_no_vector_of_classes_is_refused(sequence: Tensor) -> None:
    with pytest.raises(ValueError, match="LabelMap: expected an int64 vector"):
        LabelMap(sequence)


def test_the_largest_counts_are_assigned_first() -> None:
    # Target 0 likes source 1 best, but target 1 likes it more.
    counts = torch.tensor([[3, 0], [5, 9], [4, 2]])
    assert frequency_map(counts).tolist() == [2, 1]


def test_equal_counts_go_to_the_lowest_flat_index() -> None:
    assert frequency_map(torch.zeros(4, 3, dtype=torch.int64)).tolist() == [0, 1, 2]
    assert frequency_map(torch.tensor([[0, 7], [7, 7], [0, 0]])).tolist() == [1, 0]


def test_target_classes_that_never_appear_still_get_a_source_of_their_own() -> None:
    assert frequency_map(torch.tensor([[0, 5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 2]])).tolist() == [1, 0, 3]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), st.integers(0, 4), st.data())
def test_the_map_is_one_to_one_and_greedy(target: int, surplus: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(0, 4), min_size=target, max_size=target)
    rows = data.draw(st.lists(row, min_size=target + surplus, max_size=target + surplus))
    counts = torch.tensor(rows)
    before = counts.clone()
    sequence = frequency_map(counts)
    assert torch.equal(counts, before)
    cells = sorted(
        (-rows[source][goal], source * target + goal) for source in range(len(rows)) for goal in range(target)
    )
    expected: dict[int, int] = {}
    for _, cell in cells:
        source, goal = divmod(cell, target)
        if source not in expected.values() and goal not in expected:
            expected[goal] = source
    assert sequence.tolist() == [expected[goal] for goal in range(target)]


def test_predictions_are_counted_per_source_and_target() -> None:
    batches = [
        (torch.tensor([[2], [2], [0]]), torch.tensor([0, 1, 1])),
        (torch.tensor([[2], [3]]), torch.tensor([0, 0])),
    ]
    counts = count_predictions(Echo(4), batches, target_classes=2)
    assert counts.tolist() == [[0, 1], [0, 0], [2, 1], [1, 0]]


def test_counting_is_in_eval_mode_and_puts_every_mode_back() -> None:
    model = Echo(4).train()
    model.norm.eval()
    mean = model.norm.running_mean.clone()
    count_predictions(model, [(torch.tensor([[2], [1]]), torch.tensor([0, 1]))], target_classes=2)
    assert not any(model.seen_training)
    assert not any(model.seen_grad)
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(model.norm.running_mean, mean)


def test_modes_are_put_back_after_an_error_too() -> None:
    model = Echo(4).train()
    with pytest.raises(RuntimeError):
        count_predictions(model, [(torch.tensor([[9]]), torch.tensor([0]))], target_classes=2)
    assert model.training


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        count_predictions(Echo(4), [], target_classes=2)


def test_the_identity_takes_the_first_source_classes() -> None:
    assert identity_map(5, 3).tolist() == [0, 1, 2]


def test_more_target_than_source_classes_are_refused() -> None:
    message = r"at most 2 target classes, .* got 3 \(label_map\.kind=head"
    with pytest.raises(ValueError, match=message):
        frequency_map(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        identity_map(2, 3)


@pytest.mark.parametrize("counts", [torch.zeros(3, 2), torch.zeros(6, dtype=torch.int64)])
def test_counts_that_are_no_table_of_integers_are_refused(counts: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected integer counts \[source, target\]"):
        frequency_map(counts)
