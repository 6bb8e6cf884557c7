"""How are a step's weights packed? By the pattern that they obey, or all of them."""

from __future__ import annotations

from collections.abc import Sequence

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
# Output channels that are looked at first: whole rows of each block, and enough to refuse most.
_FIRST_ROWS = 64
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
        if _obeys(kept[:_FIRST_ROWS], pattern) and _obeys(kept, pattern):
            return pattern
    return Channel() if groups == 1 and _is_channel(kept) else Unstructured()


def _obeys(kept: Tensor, pattern: Block) -> bool:
    """Whether each block is kept, or dropped, whole."""
    counts = pattern.reduce_sum(kept.float())
    sizes = pattern.reduce_sum(torch.ones_like(kept, dtype=torch.float32))
    return bool(((counts == 0) | (counts == sizes)).all())


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
        _make_step(draft, name, dtype, is_sparse.get(name, True), values)
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


def _make_step(
    draft: Draft, name: str, dtype: torch.dtype, is_sparse: bool, values: Sequence[PlanValue]
) -> PlanStep:
    layer = None
    if draft.weight is not None:
        if (dtype, is_sparse) not in draft.layers:
            draft.layers[dtype, is_sparse] = _pack(draft, name, dtype, is_sparse)
        layer = draft.layers[dtype, is_sparse]
    ends = (draft.x, draft.residual, draft.output, draft.first_channel)
    constant = None
    if draft.constant is not None:
        assert draft.output is not None
        assert draft.x is not None
        sizes = values[draft.x].height, values[draft.x].width
        constant = _act_unseen(draft, *sizes).permute(1, 2, 0).to(values[draft.output].dtype).contiguous()
    rest = (draft.act, draft.counts_padding, draft.read_channel, constant)
    return PlanStep(name, draft.op, draft.geometry, layer, "", *ends, *rest)


def _pack(draft: Draft, name: str, dtype: torch.dtype, is_sparse: bool) -> PlanLayer:
    assert draft.kept is not None
    assert draft.weight is not None
    g = draft.geometry
    kept = draft.kept if is_sparse else torch.ones_like(draft.kept)
    pattern = detect_pattern(kept, g.groups) or dense_pattern(draft)
    packed = pack(torch.where(draft.kept, draft.weight, 0.0), kept, pattern, g, dtype)
    bias = None if draft.bias is None else draft.bias.float()
    return PlanLayer(name, "linear" if draft.op == "linear" else "conv2d", packed, bias)


def _act_unseen(draft: Draft, height: int, width: int) -> Tensor:
    """The constant, through the activation where it is all there is: outputs that see no image.

    Curves come after everything, natively too.
    """
    assert draft.constant is not None
    constant = draft.constant.clone()
    if draft.act not in ("relu", "relu6"):
        return constant
    done = constant.clamp(0, 6 if draft.act == "relu6" else None)
    g = draft.geometry
    spans = [
        _seen(*sizes)
        for sizes in zip(
            (height, width), constant.shape[1:], g.kernel_size, g.stride, g.padding, g.dilation, strict=True
        )
    ]
    (top, bottom), (left, right) = spans
    done[:, top:bottom, left:right] = constant[:, top:bottom, left:right]
    return done


def _seen(size: int, out: int, window: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """Outputs of one axis that see images: as csrc/runtime/framed.h has it."""
    before = padding - dilation * (window - 1)
    begin = min(max(0, -(-before // stride)), padding // stride)
    return begin, min(out, (padding + size - 1) // stride + 1)


def dense_pattern(draft: Draft) -> Pattern:
    """How weights that are all kept are packed: in the order that the dense kernel of their kind reads."""
    g = draft.geometry
    if g.groups == 1:
        return Channel()
    K, C, _, _ = g.weight_shape
    filters = K // g.groups
    return Unstructured() if filters == C == 1 else Block(32 if filters % 32 == 0 else filters, C)
