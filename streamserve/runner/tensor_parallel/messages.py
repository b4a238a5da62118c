"""What the first rank tells the others: plain data, in the order of its own calls."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from streamserve.core.plan import SchedulerOutput


class Launch(NamedTuple):
    """Start this step."""

    plan: SchedulerOutput


class Sample(NamedTuple):
    """Take what the first rank draws. Its masks stay there; that there are some counts."""

    step_id: int
    has_masks: bool


class Call(NamedTuple):
    """Do what has this name, before the next step."""

    name: str


Message: TypeAlias = Launch | Sample | Call | None
"""``None``: no more comes."""
