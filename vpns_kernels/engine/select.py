"""How are a step's weights packed? By the pattern that they obey, or all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from vpns_kernels.engine.drafts import Draft, Lowered
from vpns_kernels.engine.layer import PlanLayer
from vpns_kernels.engine.plan import Plan, PlanStep, PlanValue
from vpns_kernels.formats import pack
from vpns_kernels.patterns import Block, Channel, Pattern, Unstructured

# Blocks that a mask without a name may turn out to be made of, the largest first: [bk, bc].
_BLOCKS = (
    *((64, 64), (32, 64), (64, 32), (32, 32), (16, 32), (32, 16), (16, 16)),
    *((8, 16), (16, 8), (8, 8), (16, 4), (16, 1)),
)
# Blocks from here on read and write channels where they are; whole channels have to be gathered.
_LEAST_PREFERRED = 16


def detect_pattern(kept: Tensor, groups: int = 1) -> Pattern | None:
    """The pattern with the largest units that a mask obeys; None of a mask that keeps everything.

    Args:
        kept: bool [K, C / groups, R, S].
    """
    if bool(kept.all()):
        return None
    K, C = kept.shape[:2]
    for bk, bc in _BLOCKS:
        # A block as large as the layer says nothing.
        if (bk >= 2 * K or bc >= 2 * C) or (groups > 1 and K // groups % bk):
            continue
        if bk < _LEAST_PREFERRED and groups == 1 and _is_channel(kept):
            return Channel()
        pattern = Block(bk, bc)
        counts = pattern.reduce_sum(kept.float())
        sizes = pattern.reduce_sum(torch.ones_like(kept, dtype=torch.float32))
        if bool(((counts == 0) | (counts == sizes)).all()):
            return pattern
    return Channel() if groups == 1 and _is_channel(kept) else Unstructured()


def _is_channel(kept: Tensor) -> bool:
    """Whether some output and some input channels are kept, whole."""
    rows, columns = kept.flatten(1).any(1), kept.transpose(0, 1).flatten(1).any(1)
    return torch.equal(kept, (rows[:, None] & columns[None, :])[:, :, None, None].expand_as(kept))


def draft_plan(lowered: Lowered, dtype: torch.dtype, is_sparse: dict[str, bool], chunk: int = 1) -> Plan:
    """A plan of all steps with packed weights.

    Args:
        dtype: of activations and weights between input and output; the last layer writes float32.
        is_sparse: of each layer with weights, whether what was pruned is left out.
    """
    last = lowered.steps[-1]
    values = [PlanValue(*size, dtype) for size in lowered.sizes]
    if last.weight is not None and last.output == lowered.output and last.residual is None:
        values[lowered.output] = PlanValue(*lowered.sizes[lowered.output], torch.float32)
    names = _unique_names(lowered)
    steps = [
        _make_step(draft, name, dtype, is_sparse.get(name, True))
        for draft, name in zip(lowered.steps, names, strict=True)
    ]
    return Plan(tuple(steps), tuple(values), lowered.input, lowered.output, chunk, lowered.is_flat)


def _unique_names(lowered: Lowered) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for draft in lowered.steps:
        seen[draft.layer] = count = seen.get(draft.layer, 0) + 1
        names.append(draft.layer if count == 1 else f"{draft.layer}#{count}")
    return names


def _make_step(draft: Draft, name: str, dtype: torch.dtype, is_sparse: bool) -> PlanStep:
    layer = None
    if draft.weight is not None:
        assert draft.kept is not None
        g = draft.geometry
        kept = draft.kept if is_sparse else torch.ones_like(draft.kept)
        pattern = detect_pattern(kept, g.groups) or dense_pattern(draft)
        weight = torch.where(draft.kept, draft.weight, 0.0)
        packed = pack(weight, kept, pattern, g, dtype)
        bias = None if draft.bias is None else draft.bias.float()
        layer = PlanLayer(name, "linear" if draft.op == "linear" else "conv2d", packed, bias)
    ends = (draft.x, draft.residual, draft.output, draft.first_channel)
    return PlanStep(name, draft.op, draft.geometry, layer, "", *ends, draft.act, draft.counts_padding)


def dense_pattern(draft: Draft) -> Pattern:
    """How weights that are all kept are packed: in the order that the dense kernel of their kind reads."""
    g = draft.geometry
    if g.groups == 1:
        return Channel()
    K, C, _, _ = g.weight_shape
    filters = K // g.groups
    return Unstructured() if filters == C == 1 else Block(32 if filters % 32 == 0 else filters, C)
