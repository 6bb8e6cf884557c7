"""How does a stage train? Epoch by epoch, each validated; resumable after any iteration; the best stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vpns.batches import Batch, Pass, count_iterations, derive_seed, iterate_epoch, iterate_split
from vpns.config import StageConfig
from vpns.data import Split
from vpns.nonfinite import locate_nonfinite
from vpns.observe import EpochMetrics, StageStart, Step
from vpns.optimizers import load_optimizer, optimizer_tensors
from vpns.stages.context import Context
from vpns.stages.interrupt import deferred_interrupt
from vpns.state import load_state, save_state
from vpns.step import Learner, predict_logits, train_step


@dataclass(frozen=True, eq=False)
class Training:
    """A stage about to train.

    Args:
        tensors: all that the stage changes, live, by name; the best of them are what remains at the end.
        begin_epoch: sets what an epoch trains and how fast, and returns the passes of its iterations.
        is_prompted: whether validation images carry the prompt.
        follow: what else moves before each epoch, but not again where a run goes on in its midst.
    """

    stage: str
    settings: StageConfig
    learner: Learner
    tensors: dict[str, Tensor]
    train: Split
    val: Split
    begin_epoch: Callable[[int], tuple[Pass, ...]]
    is_prompted: bool
    follow: Callable[[int], None] = lambda epoch: None


@dataclass
class _Position:
    """Where a stage is: all that its state holds besides tensors."""

    epoch: int = 0
    iteration: int = 0
    updates: int = 0
    images_seen: int = 0
    epoch_images: int = 0
    epoch_loss: float = 0.0
    epoch_right: int = 0
    seconds: float = 0.0
    best_accuracy: float | None = None
    best_epoch: int = 0


def train(training: Training, context: Context) -> dict[str, Any]:
    """Train from the last saved state, or from the start; ends with the best tensors in place.

    Returns:
        For the stage's record: best validation accuracy (0-100) and its epoch, updates, images and seconds.

    Raises:
        FloatingPointError: naming stage and iteration, where a loss or a weight is no longer finite.
        KeyboardInterrupt: after the state was saved.
    """
    return _Loop(training, context).run()


class _Loop:
    """One stage's training under way."""

    def __init__(self, training: Training, context: Context) -> None:
        self.training = training
        self.context = context
        self.folder = context.stage_folder(training.stage)
        self.iterations = count_iterations(training.train, training.settings.batch_size)
        self.position = _Position()
        self.best: dict[str, Tensor] = {}
        self._resume()
        self.started_at = time.monotonic() - self.position.seconds
        self.saved_at = time.monotonic()

    def run(self) -> dict[str, Any]:
        position, epochs = self.position, self.training.settings.epochs
        updates = self.iterations * sum(len(self.training.begin_epoch(epoch)) for epoch in range(epochs))
        for observer in self.context.observers:
            observer.on_start(StageStart(self.training.stage, updates, position.updates))
        with deferred_interrupt() as is_asked:

            def is_interrupted() -> bool:
                # By anybody: a process that stopped alone would leave the others waiting for its gradients.
                return self.training.learner.group.add(is_asked())[0] > 0

            while position.epoch < epochs:
                self._run_epoch(is_interrupted)
                self._validate()
                self._save_if(is_interrupted)
        if not self.best:
            self._keep_if_best(self._accuracy())
        _copy(self.best, self.training.tensors)
        return {
            "val_accuracy": position.best_accuracy,
            "best_epoch": position.best_epoch,
            "updates": position.updates,
            "images_seen": position.images_seen,
            "seconds": position.seconds,
        }

    def _run_epoch(self, is_interrupted: Callable[[], bool]) -> None:
        position, training = self.position, self.training
        passes = training.begin_epoch(position.epoch)
        if position.iteration == 0:
            training.follow(position.epoch)
        training.learner.predictor.train()
        for batches in self._batches(passes):
            try:
                self._update(batches)
            except FloatingPointError as error:
                where = locate_nonfinite(training.learner.predictor, batches)
                raise FloatingPointError(
                    f"{training.stage}, iteration {self._iteration}: {error}; {where}"
                ) from error
            position.iteration += 1
            self._save_if(is_interrupted)

    def _update(self, batches: Sequence[Batch]) -> None:
        position, config = self.position, self.context.config
        # What draws from torch's own generator, such as dropout, must not depend on where a run was resumed.
        group = self.training.learner.group
        torch.manual_seed(
            derive_seed(config.seed, self.training.stage, "torch", self._iteration) + group.rank
        )
        for batch in batches:
            loss, right = train_step(self.training.learner, batch.split(self.training.settings.accumulate))
            position.updates += 1
            position.images_seen += len(batch.labels)
            position.epoch_images += len(batch.labels)
            position.epoch_loss += loss * len(batch.labels)
            position.epoch_right += right
            for observer in self.context.observers:
                observer.on_step(Step(self.training.stage, position.epoch, self._iteration, loss))
        group.follow_first([*self.training.learner.predictor.network.buffers()])

    def _validate(self) -> None:
        position = self.position
        accuracy = self._accuracy()
        lr: float = self.training.learner.optimizer.param_groups[0]["lr"]
        position.epoch += 1
        position.seconds = time.monotonic() - self.started_at
        metrics = EpochMetrics(
            stage=self.training.stage,
            epoch=position.epoch,
            iteration=position.epoch * self.iterations,
            loss=position.epoch_loss / position.epoch_images,
            train_accuracy=100 * position.epoch_right / position.epoch_images,
            accuracy=accuracy,
            lr=lr,
            updates=position.updates,
            images_seen=position.images_seen,
            seconds=position.seconds,
        )
        self.context.metrics.append(metrics)
        self._keep_if_best(accuracy)
        position.iteration = position.epoch_images = position.epoch_right = 0
        position.epoch_loss = 0.0
        for observer in self.context.observers:
            observer.on_eval(metrics)

    def _accuracy(self) -> float:
        training, learner = self.training, self.training.learner
        learner.predictor.eval()
        batches = iterate_split(training.val, learner.predictor.prompt.image_size, training.is_prompted)
        logits = predict_logits(learner.predictor, learner.label_map, batches)
        right = logits.argmax(1) == training.val.labels
        return 100 * float(right.double().mean())

    def _keep_if_best(self, accuracy: float) -> None:
        if self.position.best_accuracy is None or accuracy > self.position.best_accuracy:
            self.position.best_accuracy = accuracy
            self.position.best_epoch = self.position.epoch
            self.best = {name: tensor.detach().clone() for name, tensor in self.training.tensors.items()}

    def _batches(self, passes: tuple[Pass, ...]) -> Iterable[tuple[Batch, ...]]:
        training, config = self.training, self.context.config
        return iterate_epoch(
            training.train,
            passes,
            (training.stage, self.position.epoch, self.position.iteration),
            training.settings.batch_size,
            training.learner.predictor.prompt.image_size,
            config.data,
            config.seed,
        )

    @property
    def _iteration(self) -> int:
        return self.position.epoch * self.iterations + self.position.iteration

    def _save_if(self, is_interrupted: Callable[[], bool]) -> None:
        """Save when it is time to, or when Ctrl-C asks to stop here."""
        is_due = time.monotonic() - self.saved_at >= self.context.config.save_every_s
        stops = is_interrupted()
        if is_due or stops:
            self._save()
        if stops:
            raise KeyboardInterrupt

    def _save(self) -> None:
        self.position.seconds = time.monotonic() - self.started_at
        tensors = {f"live.{name}": tensor for name, tensor in self.training.tensors.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        optimizer = self.training.learner.optimizer
        tensors |= {
            f"optimizer.{k}": v for k, v in optimizer_tensors(optimizer, self.training.tensors).items()
        }
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise FloatingPointError(
                    f"{self.training.stage}, iteration {self._iteration}: expected finite tensors to save, "
                    f"got others in {name} (a lower learning rate may help)"
                )
        save_state(self.folder, tensors, asdict(self.position))
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        loaded = load_state(self.folder)
        if loaded is not None:
            tensors, position = loaded
            self.position = _Position(**position)
            _copy(_below("live.", tensors), self.training.tensors)
            self.best = _below("best.", tensors)
            load_optimizer(
                self.training.learner.optimizer, self.training.tensors, _below("optimizer.", tensors)
            )
        self.context.metrics.rewind(self.training.stage, self.position.epoch)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
