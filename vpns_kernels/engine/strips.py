"""Which steps take an image together, a strip of rows at a time? Those of runs of blocks that are faster so.

Between two residual blocks, as between two layers of a chain, one activation alone is alive. Steps are cut
wherever that is so. What may run by strips are these pieces, and runs of pieces whose inputs are of one
height: such a run ends with the piece that makes activations smaller, so that little is left in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from vpns_kernels.engine.engine import Engine
from vpns_kernels.engine.plan import Plan

# First step and number of steps, as Plan.strips has them.
Group = tuple[int, int]
_REPEATS = 4
# A later candidate has to be this much faster: timings of the same thing differ as much.
CLEARLY = 0.97


def with_strips(engine: Engine, x: Tensor) -> Engine:
    """The engine with the groups of steps by strips that are clearly faster so.

    Args:
        x: images to measure with, some for each thread.
    """
    runs, pieces = (_that_run(engine, found) for found in find_strips(engine.plan))
    ways: list[Sequence[Group]] = [(), runs, pieces] if runs or pieces else []
    least = [[math.inf] * len(engine.plan.steps) for _ in ways]
    for repeat in range(_REPEATS + 1):
        for place, groups in enumerate(ways):
            engine.set_strips(groups)
            taken = engine.profile(x)
            if repeat > 0:
                least[place] = list(map(min, least[place], taken))
    engine.set_strips(engine.plan.strips)
    chosen = choose_strips(runs, pieces, *least) if ways else ()
    if not chosen:
        return engine
    plan = replace(engine.plan, strips=chosen)
    return Engine(plan, engine.reports, threads=engine.threads, programs=engine.programs)


def choose_strips(
    runs: Sequence[Group],
    pieces: Sequence[Group],
    alone: Sequence[float],
    by_runs: Sequence[float],
    by_pieces: Sequence[float],
) -> tuple[Group, ...]:
    """The faster of each run, some of its pieces, and neither.

    Args:
        alone, by_runs, by_pieces: seconds of each step without strips, and with those of either kind.
    """
    chosen: list[Group] = []
    for run in [*runs, *(piece for piece in pieces if not any(_holds(run, piece) for run in runs))]:
        inner = [piece for piece in pieces if _holds(run, piece)]
        inner = [piece for piece in inner if _total(by_pieces, piece) < CLEARLY * _total(alone, piece)]
        gained = sum(_total(alone, piece) - _total(by_pieces, piece) for piece in inner)
        whole = _total(by_runs, run) if run in runs else math.inf
        if whole < CLEARLY * _total(alone, run) and whole < _total(alone, run) - gained:
            chosen.append(run)
        else:
            chosen += inner
    return tuple(sorted(chosen))


def find_strips(plan: Plan) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Runs of pieces, and pieces, of at least two steps that run by rows; in order."""
    pieces = _find_pieces(plan)
    runs: list[Group] = []
    height = None
    for first, count in pieces:
        x = plan.steps[first].x
        assert x is not None
        if runs and sum(runs[-1]) == first and plan.values[x].height == height:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((first, count))
        height = plan.values[x].height
    return tuple(run for run in runs if run[1] >= 2), tuple(piece for piece in pieces if piece[1] >= 2)


def _that_run(engine: Engine, groups: Sequence[Group]) -> list[Group]:
    """Those whose kernels can compute some rows alone."""
    engine.set_strips(groups)
    return [group[:2] for group in engine.strips]


def _find_pieces(plan: Plan) -> list[Group]:
    """The steps between two neighbouring cuts, where all of them run by rows."""
    cuts = [place for place in range(len(plan.steps) + 1) if _count_alive(plan, place) <= 1]
    pieces = [(begin, end - begin) for begin, end in itertools.pairwise(cuts)]
    return [
        (first, count)
        for first, count in pieces
        if all(map(plan.runs_by_rows, plan.steps[first : first + count]))
    ]


def _count_alive(plan: Plan, place: int) -> int:
    """Values that steps before `place` write, or the caller, and steps from there on read, or the caller."""
    written = {plan.input, *(step.output for step in plan.steps[:place])}
    read = {plan.output}
    for step in plan.steps[place:]:
        read |= {step.x, step.residual}
    return len((written & read) - {None})


def _holds(run: Group, piece: Group) -> bool:
    return run[0] <= piece[0] and sum(piece) <= sum(run)


def _total(seconds: Sequence[float], group: Group) -> float:
    return sum(seconds[group[0] : sum(group)])
