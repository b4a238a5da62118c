"""Who computes a prefix that others wait for: the same new prefix is not computed twice."""

from __future__ import annotations

from collections.abc import Callable

from streamserve.core.request import Request, RequestStatus


class PrefixClaims:
    """Each running request claims the first known full block that it has not written yet.

    One claim per request is enough. Whoever shares more of the prompt finds the blocks before it
    in the cache, misses this one, and waits; and again for the next one, chunk by chunk. A claim
    ends with the seat, and then the next in line computes.

    Nobody waits for somebody with another salt, not for what is public either: how far that one is
    would show in how long it takes.
    """

    def __init__(self, block_size: int, outranks: Callable[[Request, Request], bool]) -> None:
        self._block_size = block_size
        self._outranks = outranks
        self._holders: dict[tuple[str, bytes], Request] = {}  # by salt and block

    def must_wait(self, request: Request, block_hash: bytes) -> bool:
        """Whether another computes this block and ``request`` should wait for it.

        Not for one that it outranks: requests in between could keep that one waiting forever.
        """
        holder = self._holders.get((request.cache_salt, block_hash))
        return holder is not None and not self._outranks(request, holder)

    def update(self, request: Request) -> None:
        """Move the claim of a running request to where it is now."""
        index = request.num_written_tokens // self._block_size
        hashes = request.block_hashes
        block_hash = hashes[index] if index < len(hashes) else None
        if block_hash is not request.computing_hash:
            self.drop(request)
            if block_hash is not None:
                self._holders[request.cache_salt, block_hash] = request
                request.computing_hash = block_hash

    def drop(self, request: Request) -> None:
        """Claim nothing any more."""
        block_hash = request.computing_hash
        if block_hash is not None:
            request.computing_hash = None
            if self._holders.get((request.cache_salt, block_hash)) is request:
                del self._holders[request.cache_salt, block_hash]

    def check_integrity(self) -> None:
        """Assert that every claim is that of a running request."""
        for (salt, block_hash), request in self._holders.items():
            assert request.cache_salt == salt
            assert request.computing_hash == block_hash, f"{request}: claims another block"
            assert request.status is RequestStatus.RUNNING, f"{request}: claims without a seat"
