"""Which programs do the calls of the ops come to, and is each what it should be?"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from bench.triton_build import SHARED_BYTES, Row, Specialised, build, tile_key, why_no_wgmma
from bench.triton_calls import Call

_waiting: list[Specialised] = []


class Programs:
    """The distinct programs of many calls. Of a call nothing is kept that holds memory.

    Args:
        every_size: tell programs apart that differ in nothing but which sizes are one or multiples of 16.
    """

    def __init__(self, found: Iterable[Call], every_size: bool = False) -> None:
        self.calls: list[Call] = []
        self._programs: dict[Hashable, Specialised] = {}
        self._users: dict[Hashable, list[Call]] = defaultdict(list)
        for call in found:
            outline = replace(call, launches=())
            self.calls.append(outline)
            for launch in call.launches:
                key = Specialised(launch, call.arch).key if every_size else tile_key(launch, call.arch)
                if key not in self._programs:
                    self._programs[key] = Specialised(launch, call.arch)
                self._users[key].append(outline)

    def compile(self, jobs: int = 1, progress: Callable[[int, int], None] = lambda *_: None) -> list[Row]:
        """One row for each program, with the calls that start it.

        Args:
            jobs: processes that compile; 1 is this one.
            progress: told after each program how many are done, and how many there are.
        """
        _waiting[:] = self._programs.values()
        built: list[Row] = []
        with ExitStack() as stack:
            if jobs == 1:
                made: Iterable[Row] = map(_build, range(len(_waiting)))
            else:
                # Forked, for kernels and their sources do not travel to another process.
                pool = stack.enter_context(multiprocessing.get_context("fork").Pool(jobs))
                made = pool.imap(_build, range(len(_waiting)))
            for row in made:
                built.append(row)
                progress(len(built), len(_waiting))
        rows = [row | _uses(self._users[key]) for key, row in zip(self._programs, built, strict=True)]
        return [row | {"no_wgmma": why_no_wgmma(row), "complaints": complaints(row)} for row in rows]

    def passes_without_product(self, rows: Sequence[Row]) -> list[str]:
        """Main passes that start something of which nothing multiplies: their products would be nowhere."""
        wanted = {_pass_of(call) for call in self.calls if call.is_main and call.refusal is None}
        found = {name for row in rows if row["is_main"] and row["products"] for name in row["passes"]}
        return sorted(wanted - found)


def complaints(row: Row) -> list[str]:
    """What must not be in a row; main kernels have more to keep than others."""
    found = []
    limit = SHARED_BYTES[int(row["arch"].removeprefix("sm_"))]
    if row["shared_bytes"] > limit:
        found.append(f"{row['shared_bytes']} bytes of shared memory, there are {limit}")
    if not row["is_main"]:
        return found
    if row["stack_bytes"] or row["local_bytes"]:
        found.append(f"it spills {row['stack_bytes'] + row['local_bytes']} bytes")
    if row["products"]:
        if row["wgmma"] == row["mma_sync"] == 0:
            found.append("its products are not on tensor cores")
        elif row["arch"] == "sm_90" and row["wgmma"] == 0 and why_no_wgmma(row) is None:
            found.append("its products are not wgmma")
    return found


def _build(number: int) -> Row:
    program = _waiting[number]
    try:
        return build(program)
    except Exception as error:
        raise RuntimeError(
            f"Programs.compile: expected {program.source.name} to compile for sm_{program.target.arch} with "
            f"{program.constants} and {program.signature}, got {type(error).__name__}: {error}"
        ) from error


def _uses(users: Sequence[Call]) -> Row:
    return {
        "is_main": any(call.is_main for call in users),
        "passes": sorted({_pass_of(call) for call in users}),
        "dtypes": sorted({call.dtype for call in users}),
        "patterns": sorted({call.pattern for call in users} - {""}),
        "layers": sorted({call.layer for call in users}),
    }


def _pass_of(call: Call) -> str:
    return f"{call.op} {call.pass_name}"
