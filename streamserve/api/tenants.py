"""Who asks: tenants by their API keys, from flags and from a file that may change meanwhile.

The file is TOML, a table for each tenant, named as it shall be shown::

    [alice]
    keys = ["sk-…", "sha256:…"]     # any of them; a digest keeps the key out of the file
    weight = 2.0                    # her share beside others, default 1
    requests_per_minute = 600
    tokens_per_minute = 100_000     # of prompts, without what the prefix cache held
    priority = 0                    # the most urgent that she may ask for; smaller is sooner

A key is never logged, shown or counted: errors name the tenant and the field.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from starlette.types import Scope

from streamserve.core.clock import Clock, monotonic
from streamserve.errors import ConfigError, InvalidParameterError

logger = logging.getLogger(__name__)

TENANT = "streamserve.tenant"
"""In the scope of a request that came with a key: its `Tenant`."""

CHECK_INTERVAL_S = 1.0
"""How long a change of the file may go unnoticed while requests come."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whose keys these are, and what they may. ``salt`` keeps what they cached to themselves."""

    name: str
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: int | None = None  # the smallest number that a request may ask for
    salt: str = field(default="", repr=False)

    def priority_of(self, asked: int | None) -> int:
        """The priority of a request. Raises ``InvalidParameterError`` for more than it may have."""
        if self.priority is None:
            return asked or 0
        if asked is None:
            return max(self.priority, 0)
        if asked < self.priority:
            raise InvalidParameterError(
                f"priority must be at least {self.priority} with this API key, got {asked}",
                param="priority",
                code="invalid_value",
            )
        return asked


ANONYMOUS = Tenant(name="")
"""Everybody, where there are no keys."""


def tenant_of(scope: Scope) -> Tenant:
    """Whose key the request came with; ``ANONYMOUS`` where none is asked for."""
    tenant: Tenant = scope.get(TENANT, ANONYMOUS)
    return tenant


class KeyRing:
    """All keys, by a digest under a secret of this process.

    A look-up in a dictionary takes no more or less time for one key than for another that is known:
    what is hashed and compared are digests that nobody outside can compute or choose.
    """

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        file: str | None = None,
        *,
        clock: Clock = monotonic,
    ) -> None:
        """``api_keys`` belong to tenants of their own: ``key-1``, ``key-2``, in this order.

        Raises ``ConfigError`` for a file that cannot be used.
        """
        self._flag_keys = api_keys
        self._file = None if file is None else Path(file)
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._next_check = clock() + CHECK_INTERVAL_S
        self._signature = self._sign()
        self._tenants = self._load()

    @property
    def is_empty(self) -> bool:
        """Whether no key is asked for."""
        return not self._tenants

    def find(self, key: bytes) -> Tenant | None:
        """Whose ``key`` this is."""
        return self._tenants.get(self._digest(sha256(key).digest()))

    async def refresh(self) -> None:
        """Read the file again if it has changed, looking at most once a second."""
        if self._file is None or self._clock() < self._next_check:
            return
        self._next_check = self._clock() + CHECK_INTERVAL_S
        if self._sign() != self._signature:
            await self.reload()

    async def reload(self) -> None:
        """Read the file again. One that cannot be used is logged, and changes nothing."""
        self._signature = self._sign()
        try:
            self._tenants = await asyncio.to_thread(self._load)
        except ConfigError as error:
            logger.warning("%s; the keys stay as they were", error)
        else:
            logger.info("read the API keys again: there are %d", len(self._tenants))

    def _load(self) -> dict[bytes, Tenant]:
        entries = [
            (Tenant(name=f"key-{i}"), [sha256(key.encode()).digest()])
            for i, key in enumerate(self._flag_keys, 1)
        ]
        if self._file is not None:
            entries += read_key_file(self._file)
        found: dict[bytes, Tenant] = {}
        names: set[str] = set()
        for tenant, digests in entries:
            if tenant.name in names:
                raise ConfigError(
                    f"--api-key-file: [{tenant.name}] is what a key of --api-key is called"
                )
            names.add(tenant.name)
            salted = replace(tenant, salt=self._salt(tenant.name))
            for digest in map(self._digest, digests):
                owner = found.setdefault(digest, salted)
                if owner is not salted:
                    raise ConfigError(
                        f"--api-key-file: {owner.name} and {tenant.name} have a key in common"
                    )
        return found

    def _digest(self, digest: bytes) -> bytes:
        return blake2b(digest, key=self._secret, person=b"key").digest()

    def _salt(self, name: str) -> str:
        hasher = blake2b(name.encode(), key=self._secret, person=b"salt", digest_size=16)
        return hasher.hexdigest()

    def _sign(self) -> tuple[int, int, int] | None:
        """What changes when the file does; ``None``: it is not there."""
        if self._file is None:
            return None
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read_key_file(file: str | Path) -> list[tuple[Tenant, list[bytes]]]:
    """The tenants in a file, each with the SHA-256 of its keys.

    Raises ``ConfigError``, which says where but nothing of what stands there.
    """
    where = f"--api-key-file {file}"
    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at [^)]*\)$", str(error))
        raise ConfigError(f"{where} is not valid TOML {place[0] if place else ''}") from None
    if not content:
        raise ConfigError(f"{where} must hold at least one tenant, got none")
    return [_read_tenant(where, name, table) for name, table in content.items()]


def _read_tenant(where: str, name: str, table: Any) -> tuple[Tenant, list[bytes]]:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must hold tables with names, and values only in them")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: a tenant's name must be 1 to 64 letters, digits, dots, dashes and"
            f" underscores, got {name[:64]!r}"
        )
    where = f"{where}: [{name}]"
    for setting in table:
        if setting != "keys" and setting not in _SETTINGS:
            raise ConfigError(f"{where} has no setting of the name {setting[:64]!r}")
    settings = {
        setting: _checked(where, setting, table[setting], *rule)
        for setting, rule in _SETTINGS.items()
        if setting in table
    }
    return Tenant(name=name, **settings), _read_keys(where, table)


def _read_keys(where: str, table: Mapping[str, Any]) -> list[bytes]:
    keys = table.get("keys")
    if not isinstance(keys, list) or not keys or not all(isinstance(k, str) and k for k in keys):
        raise ConfigError(f"{where} keys must be an array of at least one string, none empty")
    return list(map(_digest_of, keys))


def _digest_of(key: str) -> bytes:
    digest = _DIGEST.fullmatch(key)
    return sha256(key.encode()).digest() if digest is None else bytes.fromhex(digest[1])


_Rule = tuple[tuple[type, ...], Callable[[Any], bool], str]
_at_least_one: _Rule = ((int,), lambda value: 1 <= value < 2**53, "an integer of at least 1")
_SETTINGS: dict[str, _Rule] = {
    "weight": (
        (int, float),
        lambda value: 0.001 <= value <= 1000,
        "a number between 0.001 and 1000",
    ),
    "requests_per_minute": _at_least_one,
    "tokens_per_minute": _at_least_one,
    "priority": ((int,), lambda value: abs(value) < 2**31, "an integer of 32 bits"),
}


def _checked(
    where: str,
    setting: str,
    value: Any,
    kinds: Iterable[type],
    is_valid: Callable[[Any], bool],
    limit: str,
) -> Any:
    # bool is an int in Python and not in TOML.
    if isinstance(value, bool) or not isinstance(value, tuple(kinds)) or not is_valid(value):
        shown = value if isinstance(value, (int, float)) else type(value).__name__
        raise ConfigError(f"{where} {setting} must be {limit}, got {shown}")
    return value
