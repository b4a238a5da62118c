"""How much memory there is: the host's, and what its control groups leave of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from streamserve.errors import KVCacheMemoryError
from streamserve.runner.memory import AvailableMemory

ReadText = Callable[[str], str | None]
"""The text of a file, or ``None`` if it cannot be read."""

_CGROUP = "/sys/fs/cgroup"


def read_text(path: str) -> str | None:
    """The text of the file at ``path``, or ``None``."""
    try:
        return Path(path).read_text()
    except OSError:
        return None


def available_cpu_memory(read: ReadText = read_text) -> AvailableMemory:
    """The lesser of what the kernel calls available and what the control group has left.

    Raises KVCacheMemoryError where there is no ``/proc/meminfo``.
    """
    found = AvailableMemory(_mem_available(read), "MemAvailable")
    for group in _cgroup_rests(read):
        if group.num_bytes < found.num_bytes:
            found = group
    return found


def _mem_available(read: ReadText) -> int:
    for line in (read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise KVCacheMemoryError(
        "the available memory is not known: /proc/meminfo has no MemAvailable; "
        "streamserve runs on Linux"
    )


def _cgroup_rests(read: ReadText) -> Iterator[AvailableMemory]:
    """What each control group above this process has left; a limit may stand at any of them."""
    for line in (read("/proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        roots: tuple[str, ...]
        if hierarchy == "0":  # version 2, and "unified" where both are mounted
            roots = (_CGROUP, f"{_CGROUP}/unified")
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            roots = (f"{_CGROUP}/memory",)
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path is often the host's, and the mount the container's own.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            for root in roots:
                rest = _group_rest(read, f"{root}{group}".rstrip("/"), *files)
                if rest is not None:
                    yield rest


def _group_rest(
    read: ReadText, group: str, limit_file: str, usage_file: str, cache_key: str
) -> AvailableMemory | None:
    limit, usage = read(f"{group}/{limit_file}"), read(f"{group}/{usage_file}")
    if limit is None or usage is None or not limit.strip().isdigit():  # "max" is no limit
        return None
    reclaimable = 0
    for line in (read(f"{group}/memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == cache_key:
            reclaimable = int(value)
    rest = int(limit) - int(usage) + reclaimable
    return AvailableMemory(max(rest, 0), f"the rest of the limit of {group}")
