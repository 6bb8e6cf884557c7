"""Do the kernels train as torch's dense layers do? Compared for some iterations, each from the same state.

Three networks see each batch: by the kernels, by the dense reference, and by the reference in float64. A
gradient has passed many layers, each of which rounds: the kernels' may be a few times as far from float64 as
the reference's are over all iterations, and some units of roundoff. (In bfloat16 that is some 10 % and tells
less.) Then both make their update; masks may differ only where scores are as near to the threshold as the two
updates are to each other. The next iteration begins from the reference's state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from vpns.batches import Batch, derive_seed, iterate_epoch
from vpns.complaint import CheckError
from vpns.observe import Checked
from vpns.optimizers import load_optimizer, optimizer_tensors
from vpns.predictor import Predictor
from vpns.stages.context import Context
from vpns.stages.exactness import Exactness
from vpns.stages.loop import Training
from vpns.step import Learner
from vpns_kernels.convert import mask_modules
from vpns_kernels.formats import pick
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

ITERATIONS = 20
# Of activations' own type: what a gradient may be off even where the reference is right by luck. A kernel
# that is wrong is wrong by far more.
_ROUNDOFFS = {torch.float32: 128, torch.bfloat16: 32}


def compare_training(kernels: Training, reference: Training, context: Context) -> None:
    """Train both for some iterations, on the stage's own batches.

    Args:
        kernels, reference: at the same state, over tensors of their own; used up.

    Raises:
        CheckError: naming stage, iteration and tensor, where they differ by more than the bound.
    """
    batches = islice(_batches(kernels, reference, context), ITERATIONS)
    pairs = _pair_tensors(kernels, reference)
    exact = Predictor(
        *copy.deepcopy((reference.learner.predictor.prompt, reference.learner.predictor.network))
    )
    exact.double()
    dtype = torch.bfloat16 if context.config.dtype == "bfloat16" else torch.float32
    floor = _ROUNDOFFS[dtype] * torch.finfo(dtype).eps / 2
    exactness, count = Exactness(kernels.stage, floor), 0
    for count, batch in enumerate(batches, 1):
        seed = derive_seed(context.config.seed, "check", count)
        where = f"{kernels.stage}, iteration {count - 1}"
        _begin_from(reference, kernels, exact, pairs)
        _learn(kernels.learner.predictor, kernels.learner, batch, seed)
        _learn(reference.learner.predictor, reference.learner, batch, seed)
        _learn(exact, reference.learner, batch, seed)
        _measure_gradients(pairs, dict(exact.named_parameters()), exactness, count - 1)
        _compare_masks(kernels.learner, reference.learner, where)
    share = exactness.judge()
    for observer in context.observers:
        observer.on_check(Checked(kernels.stage, count, share))


@dataclass(frozen=True)
class _Pair:
    """A tensor that the kernels' network holds, and the reference's; theirs → in our shape and order."""

    name: str
    theirs: str
    ours: Tensor
    reference: Tensor
    arrange: Callable[[Tensor], Tensor]


def _pair_tensors(kernels: Training, reference: Training) -> list[_Pair]:
    network = kernels.learner.predictor.network
    layers = {f"network.{n}": m for n, m in network.named_modules()}
    pairs = []
    for name, ours in kernels.tensors.items():
        layer = layers.get(name.removesuffix(".values"))
        if name.endswith(".values") and isinstance(layer, SparseConv2d | SparseLinear):
            theirs = f"{name.removesuffix('.values')}.weight"
            pairs.append(_Pair(name, theirs, ours, reference.tensors[theirs], _picker(layer)))
        else:
            pairs.append(_Pair(name, name, ours, reference.tensors[name], lambda tensor: tensor))
    return pairs


def _picker(layer: SparseConv2d | SparseLinear) -> Callable[[Tensor], Tensor]:
    """Of a dense weight, what the layer has packed."""
    g = layer.geometry
    return lambda dense: pick(dense.reshape(g.weight_shape), layer.values.detach(), layer.layout, g)


def _batches(kernels: Training, reference: Training, context: Context) -> Iterator[Batch]:
    for epoch in range(kernels.settings.epochs):
        passes = reference.begin_epoch(epoch)
        kernels.begin_epoch(epoch)
        size, config = kernels.learner.predictor.prompt.image_size, context.config
        at, count = (kernels.stage, epoch, 0), kernels.settings.batch_size
        for batches in iterate_epoch(kernels.train, passes, at, count, size, config.data, config.seed):
            yield from batches


@torch.no_grad()
def _begin_from(reference: Training, kernels: Training, exact: Predictor, pairs: list[_Pair]) -> None:
    """Everybody takes the reference's state."""
    for pair in pairs:
        pair.ours.copy_(pair.arrange(pair.reference))
    learned = optimizer_tensors(reference.learner.optimizer, reference.tensors)
    arranged = {}
    for pair in pairs:
        for key, value in learned.items():
            name, _, what = key.rpartition(":")
            if name == pair.theirs:
                is_like = value.shape == pair.reference.shape
                arranged[f"{pair.name}:{what}"] = pair.arrange(value) if is_like else value.clone()
    load_optimizer(kernels.learner.optimizer, kernels.tensors, arranged)
    source = reference.learner.predictor
    own = dict((*source.named_parameters(), *source.named_buffers()))
    for name, tensor in (*exact.named_parameters(), *exact.named_buffers()):
        tensor.copy_(own[name])
        if isinstance(tensor, torch.nn.Parameter):
            tensor.requires_grad_(own[name].requires_grad)


def _learn(predictor: Predictor, learner: Learner, batch: Batch, seed: int) -> None:
    """Leave the batch's gradients on the predictor's tensors."""
    torch.manual_seed(seed)
    predictor.train()
    predictor.zero_grad(set_to_none=True)
    dtype = next(predictor.parameters()).dtype
    logits = learner.label_map(predictor(batch.images.to(dtype), batch.prompted))
    F.cross_entropy(logits, batch.labels).backward()


def _measure_gradients(
    pairs: list[_Pair], exact: dict[str, Tensor], exactness: Exactness, iteration: int
) -> None:
    """How far both are from float64."""
    for pair in pairs:
        truth = exact[pair.theirs].grad if pair.theirs in exact else None
        if truth is None:
            continue
        if pair.ours.grad is None or pair.reference.grad is None:
            raise CheckError(f"iteration {iteration}: expected a gradient of {pair.name}, got none")
        truth = pair.arrange(truth)
        ours = float((pair.ours.grad.double() - truth).norm())
        theirs = float((pair.arrange(pair.reference.grad).double() - truth).norm())
        exactness.add(pair.name, iteration, ours, theirs, float(truth.norm()))


@torch.no_grad()
def _compare_masks(kernels: Learner, reference: Learner, where: str) -> None:
    """Update both, and compare the masks that follow."""
    kernels.optimizer.step()
    reference.optimizer.step()
    ours, theirs = kernels.refresh(), reference.refresh()
    if ours is None or theirs is None:
        return  # Nothing moves a mask that is fixed.
    modules = mask_modules(reference.predictor.network)
    for name, module in mask_modules(kernels.predictor.network).items():
        other = modules[name]
        apart = (module.scores - other.scores).abs() + abs(ours.threshold - theirs.threshold)
        is_near = (other.scores.abs() - theirs.threshold).abs() <= apart
        wrong = int(((module.mask != other.mask) & ~is_near).sum())
        if wrong:
            raise CheckError(
                f"{where}: expected the reference's mask of {name} but at the threshold, got {wrong} others"
            )
