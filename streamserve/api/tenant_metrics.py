"""What each tenant asked for and got, for the operator's own port.

Labels are the names of the key file, or of the keys on the command line: nothing that a client can
choose. Event-loop thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from streamserve.engine.stream import RequestStream

FAMILIES = (
    ("tenant_requests", "Requests of a tenant that ended."),
    ("tenant_requests_refused", "Requests of a tenant that were refused."),
    ("tenant_prompt_tokens", "Prompt tokens of these that ended."),
    ("tenant_prompt_tokens_cached", "Those of them that the prefix cache held."),
    ("tenant_generation_tokens", "Tokens generated for a tenant."),
)
"""In the order of ``TenantCounts``."""


@dataclass(slots=True)
class TenantCounts:
    """Of one tenant, since the server began."""

    num_ended: int = 0
    num_refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0


class TenantMetrics:
    """Counts by tenant. The nameless one of a server without keys is not counted."""

    def __init__(self) -> None:
        self._counts: dict[str, TenantCounts] = {}

    def refused(self, tenant: str) -> None:
        """A request of the tenant was refused."""
        if tenant:
            self._of(tenant).num_refused += 1

    def ended(self, tenant: str, streams: Sequence[RequestStream], num_prompts: int) -> None:
        """All of a request's streams, as many for each prompt, are closed."""
        if not tenant:
            return
        counts = self._of(tenant)
        counts.num_ended += 1
        for stream in streams[:: max(len(streams) // num_prompts, 1)]:
            counts.prompt_tokens += stream.num_prompt_tokens
            counts.cached_tokens += 0 if stream.usage is None else stream.usage.cached_tokens
        counts.generation_tokens += sum(
            stream.usage.completion_tokens for stream in streams if stream.usage is not None
        )

    def samples(self) -> list[tuple[str, tuple[int, ...]]]:
        """Each tenant and its numbers, in the order of ``FAMILIES``."""
        return [(name, astuple(counts)) for name, counts in sorted(self._counts.items())]

    def _of(self, tenant: str) -> TenantCounts:
        return self._counts.setdefault(tenant, TenantCounts())
