"""What a body refers to: the response that it goes on with, and items that it only names."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from streamserve.api.responses.items import MAX_ITEMS, Item
from streamserve.errors import InvalidParameterError

KEY = "[0-9a-f]{32}"
"""What makes a response's id, and those of its items, unlike all others."""

_PREVIOUS = re.compile(rb'"previous_response_id"\s{0,64}:\s{0,64}"(resp_%b)"' % KEY.encode())
_NAMED = re.compile(rb'"id"\s{0,64}:\s{0,64}"([a-z]{1,8}_%b_i?[0-9]{1,6})"' % KEY.encode())
_OVERLAP = 256  # more than the longest match
_PIECE = 64 * 2**10  # of a body, which is searched in a millisecond
_MAX_PREVIOUS = 4  # a body has one; others may stand in what it only passes on
_ITEM_ID = re.compile(rf"[a-z]+_({KEY})_i?[0-9]+")


@dataclass(frozen=True, slots=True)
class References:
    """What was looked up. A response that is still being written is there as ``None``."""

    previous: Mapping[str, Sequence[Item] | None] = field(default_factory=dict)
    items: Mapping[str, Item] = field(default_factory=dict)

    def items_before(self, response_id: str | None) -> Sequence[Item]:
        """All that was said up to the end of a response. Raises ``InvalidParameterError``."""
        if response_id is None:
            return ()
        param = "previous_response_id"
        if response_id not in self.previous:
            raise InvalidParameterError(
                f"{param}: there is no response with id {response_id!r}",
                param=param,
                code="previous_response_not_found",
            )
        items = self.previous[response_id]
        if items is None:
            raise InvalidParameterError(
                f"{param}: the response {response_id!r} is still in progress",
                param=param,
                code="invalid_value",
            )
        return items

    def resolved(self, item: Item) -> Item:
        """``item``, or the one that it refers to. Raises ``InvalidParameterError``."""
        if item["type"] != "item_reference":
            return item
        if item["id"] not in self.items:
            raise InvalidParameterError(
                f"input: there is no item with id {item['id']!r}", param="input", code="not_found"
            )
        return self.items[item["id"]]


NO_REFERENCES = References()


async def find_references(
    raw: bytes,
    before: Callable[[str], bytes | None],
    is_running: Callable[[str], bool],
    items_of: Callable[[str], Iterable[Item]],
) -> bytes:
    """What a body may refer to, packed, or nothing. The body is searched, not parsed: it may be
    long, and is then read in another process.

    ``before`` gives the items up to the end of a response as JSON, ``items_of`` a response's own.
    Raises ``InvalidParameterError`` for more references than a body can need.
    """
    previous: list[bytes] = []
    for found in await _found(_PREVIOUS, "previous_response_id", raw, _MAX_PREVIOUS):
        items = before(found.decode())
        if items is None and not is_running(found.decode()):
            continue
        previous.append(b'"%b":%b' % (found, b"null" if items is None else items))
    ids = await _found(_NAMED, "item_reference", raw, MAX_ITEMS)
    wanted = {found.decode(): None for found in ids}
    if not previous and not wanted:
        return b""
    named = {
        item_id: item
        for response_id in dict.fromkeys(map(response_of, wanted))
        for item in items_of(response_id)
        if (item_id := item["id"]) in wanted
    }
    return b'{"previous":{%b},"items":%b}' % (b",".join(previous), orjson.dumps(named))


async def _found(
    pattern: re.Pattern[bytes], sign: str, raw: bytes, max_found: int
) -> Iterable[bytes]:
    """What ``pattern`` finds, each once. It is looked for only where there is a ``sign`` of it:
    that takes a third of the time, and most bodies have none.
    """
    found: dict[bytes, None] = {}
    if sign.encode() not in raw:
        return found
    for start in range(0, len(raw), _PIECE):
        if start:
            await asyncio.sleep(0)
        found |= dict.fromkeys(pattern.findall(raw, start, start + _PIECE + _OVERLAP))
        if len(found) > max_found:
            raise InvalidParameterError(
                f"the body must hold at most {max_found} ids of the kind that {sign} needs",
                param=sign,
                code="invalid_value",
            )
    return found


def read_references(packed: bytes | memoryview) -> References:
    """What ``find_references`` packed."""
    if not packed:
        return NO_REFERENCES
    content = orjson.loads(packed)
    return References(content["previous"], content["items"])


def response_of(item_id: str) -> str:
    """The id of the response that an item of ours belongs to."""
    match = _ITEM_ID.fullmatch(item_id)
    return f"resp_{match[1]}" if match else ""
