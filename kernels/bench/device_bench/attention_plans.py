"""Sizes of attention's launches that are worth a try: changes of `attention_plan.plan`'s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from streamserve_kernels.triton import attention
from streamserve_kernels.triton.attention_plan import Plan, Tiles

Changes = dict[str, object]

# Of decodes, worth a try in a step. A stage is one tile of keys and values; all but one are on
# their way.
IN_A_STEP: dict[str, Changes] = {
    "as planned": {},
    "merged by a launch of its own": {"one_launch": False},
    "keys asked for after the wait": {"asks_ahead": False},
    "both": {"one_launch": False, "asks_ahead": False},
    "1 tile for a program": {"least_units": 1},
    "4 tiles for a program": {"least_units": 4},
    "3 stages, 2 programs": {"stages": 3, "programs_per_processor": 2},
    "5 stages, 1 program": {"stages": 5, "programs_per_processor": 1},
}
DECODES: dict[str, Changes] = {
    **IN_A_STEP,
    "3 stages": {"stages": 3},
    "3 stages, 1 program": {"stages": 3, "programs_per_processor": 1},
    "3 stages, 3 programs": {"stages": 3, "programs_per_processor": 3},
    "6 stages, 1 program": {"stages": 6, "programs_per_processor": 1},
    "6 stages, 1 program, 8 warps": {"stages": 6, "programs_per_processor": 1, "warps": 8},
    "32 keys, 6 stages": {"split": Tiles(16, 32), "stages": 6},
    "32 keys, 5 stages, 3 programs": {
        "split": Tiles(16, 32),
        "stages": 5,
        "programs_per_processor": 3,
    },
    "128 keys, 3 stages, 1 program": {
        "split": Tiles(16, 128),
        "stages": 3,
        "programs_per_processor": 1,
    },
}
CHUNKS: dict[str, Changes] = {
    "as planned": {},
    "stages 2": {"stages": 2},
    "stages 4": {"stages": 4},
    "128 x 128, stages 2": {"chunk": Tiles(128, 128), "stages": 2},
    "64 x 64, 4 warps, stages 2": {"chunk": Tiles(64, 64), "warps": 4, "stages": 2},
    "64 x 64, 4 warps, stages 3": {"chunk": Tiles(64, 64), "warps": 4},
    "64 x 128, 4 warps, stages 2": {"chunk": Tiles(64, 128), "warps": 4, "stages": 2},
    "128 x 32, stages 4": {"chunk": Tiles(128, 32), "stages": 4},
}
# A thread has 255 registers: eight warps, or two programs of four, fill a processor.
SHARED: dict[str, Changes] = {
    "as planned": {},
    "64 x 32": {"shared": Tiles(64, 32)},
    "64 x 128, stages 2": {"shared": Tiles(64, 128), "stages": 2},
    "128 rows, 8 warps, stages 2": {"shared": Tiles(128, 64), "warps": 8, "stages": 2},
    "stages 2": {"stages": 2},
    "stages 4": {"stages": 4},
}


@contextmanager
def changed(changes: Changes) -> Iterator[None]:
    """Attention's launches have these sizes inside, and the plan's others."""
    plan = attention.plan

    def with_changes(*args: object) -> Plan:
        return replace(plan(*args), **changes)

    attention.plan = with_changes
    try:
        yield
    finally:
        attention.plan = plan
