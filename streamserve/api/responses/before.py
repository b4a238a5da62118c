"""What a body refers to: the response that it goes on with, and items that it only names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from streamserve.api.responses.items import Item
from streamserve.errors import InvalidParameterError

KEY = "[0-9a-f]{32}"
"""What makes a response's id, and those of its items, unlike all others."""

_PREVIOUS = re.compile(rb'"previous_response_id"\s*:\s*"(resp_%b)"' % KEY.encode())
_NAMED = re.compile(rb'"id"\s*:\s*"([a-z]{1,8}_%b_i?[0-9]{1,6})"' % KEY.encode())
_ITEM_ID = re.compile(rf"[a-z]+_({KEY})_i?[0-9]+")


@dataclass(frozen=True, slots=True)
class Context:
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


NO_CONTEXT = Context()


def find_context(
    raw: bytes,
    before: Callable[[str], bytes | None],
    is_running: Callable[[str], bool],
    items_of: Callable[[str], Iterable[Item]],
) -> bytes:
    """What a body may refer to, packed, or nothing. The body is searched, not parsed: it may be
    long, and is then read in another process.

    ``before`` gives the items up to the end of a response as JSON, ``items_of`` a response's own.
    """
    previous: list[bytes] = []
    for found in _found(_PREVIOUS, b"previous_response_id", raw):
        items = before(found.decode())
        if items is None and not is_running(found.decode()):
            continue
        previous.append(b'"%b":%b' % (found, b"null" if items is None else items))
    wanted = [found.decode() for found in _found(_NAMED, b"item_reference", raw)]
    if not previous and not wanted:
        return b""
    named = {
        item_id: item
        for response_id in dict.fromkeys(map(response_of, wanted))
        for item in items_of(response_id)
        if (item_id := item["id"]) in wanted
    }
    return b'{"previous":{%b},"items":%b}' % (b",".join(previous), orjson.dumps(named))


def _found(pattern: re.Pattern[bytes], sign: bytes, raw: bytes) -> Iterable[bytes]:
    """What ``pattern`` finds, each once. It is looked for only where there is a ``sign`` of it:
    that takes a third of the time, and most bodies have none.
    """
    return dict.fromkeys(pattern.findall(raw)) if sign in raw else ()


def read_context(packed: bytes | memoryview) -> Context:
    """What ``find_context`` packed."""
    if not packed:
        return NO_CONTEXT
    content = orjson.loads(packed)
    return Context(content["previous"], content["items"])


def response_of(item_id: str) -> str:
    """The id of the response that an item of ours belongs to."""
    match = _ITEM_ID.fullmatch(item_id)
    return f"resp_{match[1]}" if match else ""
