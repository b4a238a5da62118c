"""What building a runner needs to know of the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from streamserve.core.plan import ModelRunner
from streamserve.models.tensor_parallel.ranks import Ranks
from streamserve.runner.memory import MemoryPlan
from streamserve.runner.tensor_parallel.lead import LeadRunner


class Team(Protocol):
    """All ranks, as one of them sees them."""

    @property
    def ranks(self) -> Ranks:
        """For sums and what was drawn."""
        ...

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        ...

    def steer(self, own: ModelRunner, commands: Mapping[str, Callable[[], None]]) -> LeadRunner:
        """On the first rank the runner of all.

        On another one ``own`` follows it from here to the end: this raises SystemExit.
        """
        ...


def agreed(memory: MemoryPlan, team: Team | None) -> MemoryPlan:
    """The plan with as many blocks as every rank has room for: they have the same numbers."""
    if team is None:
        return memory
    num_blocks = team.least(memory.num_blocks)
    return replace(memory, num_blocks=num_blocks, kv_bytes=num_blocks * memory.kv_bytes_per_block)


def steered(
    own: ModelRunner, commands: Mapping[str, Callable[[], None]], team: Team | None
) -> tuple[ModelRunner, Callable[[str], None]]:
    """The runner of all ranks, and what has all of them do one of the ``commands``."""
    if team is None:
        return own, lambda name: commands[name]()
    lead = team.steer(own, commands)
    return lead, lead.call
