"""Typed events as a client of the Responses API reads them, and what they add up to."""

from typing import Any

import orjson

ENDS = ("response.completed", "response.incomplete", "response.failed")
PART_OF = {
    "output_text": ("content", "content_index"),
    "reasoning_text": ("content", "content_index"),
    "reasoning_summary_text": ("summary", "summary_index"),
}


def typed_events(body: bytes) -> list[dict[str, Any]]:
    """The events of an SSE body, checked: names, numbers without a gap, an end and no more."""
    events = []
    for block in body.removesuffix(b"\n\n").split(b"\n\n"):
        if block.startswith(b":"):
            continue
        name, data = block.split(b"\n")
        event = orjson.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        events.append(event)
    first = events[0]["sequence_number"]
    assert [e["sequence_number"] for e in events] == list(range(first, first + len(events)))
    assert events[-1]["type"] in ENDS
    assert not any(event["type"] in ENDS for event in events[:-1])
    return events


def assembled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output items by their deltas, each step checked against what the events repeat."""
    items: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            is_open = True
            items.append(event["item"])
        elif kind == "output_item.done":
            assert is_open
            is_open = False
            assert event["output_index"] == len(items) - 1
            assert event["item"]["status"] in ("completed", "incomplete")
            expected = {**items[-1], "status": event["item"]["status"]}
            for said_late in ("encrypted_content",):
                if said_late in expected:
                    expected[said_late] = event["item"][said_late]
            assert event["item"] == expected
            items[-1] = event["item"]
        elif "output_index" in event:
            assert is_open
            _check_place(event, items)
            _take(kind, event, items[-1])
    assert not is_open
    return items


def _check_place(event: dict[str, Any], items: list[dict[str, Any]]) -> None:
    assert event["output_index"] == len(items) - 1
    assert event["item_id"] == items[-1]["id"]
    assert event.get("content_index", 0) == event.get("summary_index", 0) == 0


def _take(kind: str, event: dict[str, Any], item: dict[str, Any]) -> None:
    what, _, step = kind.rpartition(".")
    if what in ("content_part", "reasoning_summary_part"):
        parts = item["summary" if what.startswith("reasoning") else "content"]
        if step == "added":
            parts.append(event["part"])
        assert parts == [event["part"]]
        return
    if what == "function_call_arguments":
        holder, field = item, "arguments"
    else:
        name, index = PART_OF[what]
        assert index in event
        [holder], field = item[name], "text"
    if step == "delta":
        assert event["delta"] or event.get("logprobs")
        holder[field] += event["delta"]
        if event.get("logprobs"):
            holder["logprobs"] += event["logprobs"]
    else:
        assert step == "done"
        assert event[field] == holder[field]
        assert event.get("logprobs", []) == holder.get("logprobs", [])
