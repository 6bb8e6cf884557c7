"""What can `vpns bench --model` be told? Which network, how pruned, at which sizes, against whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vpns.option_help import add_debug, asks_help

_USAGE = """vpns bench RUN [--dry-run]
       vpns bench ARTIFACT [options]
       vpns bench --model NAME [options]"""

_SEEDS, _QUICK_SEEDS = 5, 1
_ROUNDS, _QUICK_ROUNDS, _LAYER_ROUNDS, _QUICK_LAYER_ROUNDS = 30, 10, 10, 3
# What the fastest dense engine is looked for among in a hurry; the first two must be there to speak of it.
_QUICK_OPPONENTS = (
    "torch.compile bfloat16", "openvino bfloat16", "torch bfloat16", "torch float32", "openvino float32",
)  # fmt: skip


@dataclass(frozen=True)
class BenchOptions:
    """Every combination of models, patterns, densities, batches and sizes is measured.

    Args:
        models: resnet18 and the like, a name that torchvision or timm has, module:factory, or the folder of a
            run or of an artifact.
        patterns, densities: of random masks; none for a network that is pruned already.
        sizes: of the images in pixels; none for the artifact's own, or 224.
        dtype: of the sparse network: auto, float32 or bfloat16.
        opponents: dense engines; None for all, which then must be there.
        seeds: how many random masks.
        device: cpu or cuda, for all engines.
        json: where the results go, with a plot beside them.
        shows_goals: whether to print which of this project's own goals were met; the JSON has them always.
    """

    models: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()
    batches: tuple[int, ...] = (16,)
    sizes: tuple[int, ...] = ()
    dtype: str = "auto"
    opponents: tuple[str, ...] | None = None
    seeds: int = _SEEDS
    device: str = "cpu"
    rounds: int = _ROUNDS
    layer_rounds: int = _LAYER_ROUNDS
    threads: int | None = None
    json: Path | None = None
    shows_goals: bool = False

    def __post_init__(self) -> None:
        for name, values in (("batch", self.batches), ("size", self.sizes)):
            if any(value < 1 for value in values):
                raise ValueError(f"bench: expected {name} >= 1, got {list(values)}")
        if not self.models or not self.batches:
            raise ValueError(f"bench: expected a model and a batch, got {self.models} and {self.batches}")
        if any(not 0 < density <= 1 for density in self.densities):
            raise ValueError(f"bench: expected density in (0, 1], got {list(self.densities)}")
        for name in ("seeds", "rounds", "layer_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench: expected {name} >= 1, got {getattr(self, name)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"bench: expected dtype auto, float32 or bfloat16, got {self.dtype!r}")
        if self.threads is not None and (self.threads < 1 or self.device != "cpu"):
            raise ValueError(f"bench: expected threads >= 1 of a CPU, got {self.threads} on {self.device}")


def find_bench(arguments: Sequence[str]) -> list[str] | None:
    """The options of `vpns bench --model ...` or `vpns bench ARTIFACT ...`; None for the stage of a run.

    Where help is asked for, it is that of all three.
    """
    if list(arguments[:1]) != ["bench"]:
        return None
    options = list(arguments[1:])
    if asks_help(options):
        return options
    if any(option == "--model" or option.startswith("--model=") for option in options):
        return options
    if options and (Path(options[0]) / "manifest.json").is_file():
        return ["--model", *options]
    return None


def parse_bench(options: Sequence[str]) -> BenchOptions:
    """What they say; ArgumentError or ValueError where they are wrong."""
    parser = ArgumentParser(
        prog="vpns bench",
        usage=_USAGE,
        description=(
            "Time a network, pruned and deployed, against every dense engine installed. A RUN is timed "
            "against those that are ready within seconds, for its report; the options are of the other two."
        ),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=str, help="name, module:factory, or folder; several with commas")
    parser.add_argument("--pattern", type=str, help="of random masks; several with commas (default: block)")
    parser.add_argument("--density", type=str, help="kept fraction; several with commas (default: 0.1)")
    parser.add_argument("--batch", type=str, default="16", help="images at once; several with commas")
    parser.add_argument("--size", type=str, help="of the images in pixels; several with commas")
    parser.add_argument("--dtype", type=str, default="auto", help="of the sparse network")
    parser.add_argument("--opponents", type=str, help="dense engines, with commas (default: all)")
    parser.add_argument("--seeds", type=int, help=f"random masks of each kind (default: {_SEEDS})")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, or cuda: that of all engines")
    parser.add_argument("--rounds", type=int, help=f"interleaved timings (default: {_ROUNDS})")
    parser.add_argument("--threads", type=int, help="of every engine (default: torch's)")
    parser.add_argument("--json", type=str, help="where the results go, with a plot beside them")
    parser.add_argument("--quick", action="store_true", help="one mask, fewer engines and rounds: minutes")
    parser.add_argument("--goals", action="store_true", help="print which of this project's goals were met")
    add_debug(parser)
    given = parser.parse_args(list(options))
    opponents = _words(given.opponents, str, "opponents")
    if opponents is None and given.quick and given.device == "cpu":
        opponents = _QUICK_OPPONENTS
    return BenchOptions(
        models=_words(given.model, str, "model") or (),
        patterns=_words(given.pattern, str, "pattern") or (),
        densities=_words(given.density, float, "density") or (),
        batches=_words(given.batch, int, "batch") or (),
        sizes=_words(given.size, int, "size") or (),
        dtype=given.dtype,
        opponents=opponents,
        device=given.device,
        seeds=_default(given.seeds, _QUICK_SEEDS if given.quick else _SEEDS),
        rounds=_default(given.rounds, _QUICK_ROUNDS if given.quick else _ROUNDS),
        layer_rounds=_QUICK_LAYER_ROUNDS if given.quick else _LAYER_ROUNDS,
        threads=given.threads,
        json=None if given.json is None else Path(given.json),
        shows_goals=given.goals,
    )


def _default(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def _words(text: str | None, kind: Callable[[str], Any], name: str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(word.strip()) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise ValueError(f"bench: expected --{name} as {kind.__name__}, got {text!r}") from error
