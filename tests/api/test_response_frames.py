"""The events of a response, however its text is cut, add up to the response that is not streamed.

Without a server: frames and parsers, as a stream and as a whole answer use them.
"""

import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.api.responses.frames import ResponseFrames, Snapshots
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.reasoning import ReasoningParser, ReasoningTokens, ThinkState
from streamserve.engine.parsers.tool_formats import TOOL_PARSERS
from streamserve.errors import QueueFullError
from tests.api.typed_events import assembled, typed_events
from tests.engine.parsers.cutting import cuts, pieces

KEY = "0" * 32
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TEXTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "\n", " ", "Hm. ", "Łódź ", CALL, "<tool_call>", '{"name"', "x"]
    ),
    max_size=8,
).map("".join)
OPTIONS = st.fixed_dictionaries(
    {"shows_summary": st.booleans(), "seals_thoughts": st.booleans(), "is_queued": st.booleans()}
)


def parser_of(kind: str) -> AnswerParser | None:
    if kind == "plain":
        return None
    state = ThinkState.INSIDE if kind == "inside" else ThinkState.UNDECIDED
    return AnswerParser(
        reasoning=ReasoningParser(state),
        tools=TOOL_PARSERS["hermes"]({"add": {}}),
        tokens=ReasoningTokens(state, lambda token_id: bytes([token_id])),
    )


def frames_of(kind, finished, **options):
    options = {"shows_summary": False, "seals_thoughts": False, **options}
    return ResponseFrames(
        KEY,
        Snapshots({"id": f"resp_{KEY}", "temperature": 1.0}, lambda: 1.0),
        lambda *end: finished.append(end),
        parser=parser_of(kind),
        names=None,
        **options,
    )


def run(kind, parts, reason, options):
    """The events, and the response as it was finished."""
    finished = []
    frames = frames_of(kind, finished, **options)
    body = frames.echo_at_once(Usage(3))
    for part in parts:
        usage = Usage(3, len(part))
        frames.hold(RequestOutput(part, list(part.encode()), usage))
        if part:
            body += frames.text(part, usage)
    assert finished == []
    body += frames.last(reason, Usage(3, 5))
    [(response, output)] = finished
    response = orjson.loads(response)
    assert response["output"] == orjson.loads(output)
    return typed_events(body), response


def without_call_ids(value):
    return orjson.loads(re.sub(rb'"call_[0-9a-f]+"', b'"call"', orjson.dumps(value)))


@given(st.sampled_from(["plain", "inside", "maybe"]), TEXTS, cuts, OPTIONS,
       st.sampled_from(["stop", "length"]))  # fmt: skip
def test_events_add_up_to_the_whole_response(kind, text, where, options, reason):
    events, response = run(kind, pieces(text, where), reason, options)
    assert assembled(events) == response["output"]
    assert events[-1]["response"] == response
    _, whole = run(kind, [text], reason, options)
    assert without_call_ids(response) == without_call_ids(whole)
    said = [item for item in response["output"] if item["type"] == "message"]
    if kind == "plain":
        assert said[0]["content"][0]["text"] == text
    ids = [item["id"] for item in response["output"]]
    assert len(set(ids)) == len(ids) > 0


@pytest.mark.parametrize(
    ("reason", "status", "completed_at"), [("stop", "completed", 1), ("length", "incomplete", None)]
)
def test_the_end_says_whether_it_is_whole(reason, status, completed_at):
    events, response = run("plain", ["Hi"], reason, {})
    assert (response["status"], response["completed_at"]) == (status, completed_at)
    assert [item["status"] for item in response["output"]] == [status]
    assert events[0]["response"]["completed_at"] is None


def test_usage_says_what_was_cached():
    finished = []
    frames = frames_of("plain", finished)
    frames.last("stop", Usage(30, 5, cached_tokens=16))
    usage = orjson.loads(finished[0][0])["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 16


@pytest.mark.parametrize("end", ["failure", "cancelled"])
def test_who_fails_or_is_cancelled_has_used_what_it_has(end):
    finished = []
    frames = frames_of("plain", finished)
    frames.text("Hi", Usage(3, 1))
    if end == "failure":
        last = frames.failure(QueueFullError("full", retry_after_s=1.0), Usage(3, 2))
    else:
        last = frames.cancelled(Usage(3, 2))
    response = orjson.loads(finished[0][0])
    assert typed_events(last)[-1]["response"] == response
    assert response["usage"]["output_tokens"] == 2
    assert response["output"][0]["status"] == "incomplete"
    if end == "failure":
        assert response["error"]["code"] == "rate_limit_exceeded"


def test_only_a_message_without_a_parser_is_written_past_the_frames():
    """What a parser has not seen could be a call."""
    for kind, opened in (("plain", False), ("undecided", True)):
        frames = frames_of(kind, [])
        if opened:
            frames.text("Hello. ", Usage(3, 1))
        assert frames.late_sink(lambda data: True, lambda: None) is None
    frames = frames_of("plain", finished := [])
    body = frames.text("a", Usage(3, 1))
    written, sent = [], []
    takes = iter([True, False])
    sink = frames.late_sink(
        lambda data: bool(written.append(data)) or next(takes), lambda: sent.append(1)
    )
    assert sink("b")
    assert not sink("c")
    assert len(sent) == 1
    events = typed_events(body + written[0] + frames.last("stop", Usage(3, 2)))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert orjson.loads(finished[0][1])[0]["content"][0]["text"] == "ab"


@pytest.mark.parametrize(("is_queued", "second"), [(False, "in_progress"), (True, "queued")])
def test_the_first_events(is_queued, second):
    options = {"shows_summary": False, "seals_thoughts": False, "is_queued": is_queued}
    events, response = run("plain", ["Hi"], "stop", options)
    assert [e["type"].removeprefix("response.") for e in events] == [
        "created",
        second,
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["status"] == second
    assert response["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }


def test_thoughts_as_a_summary():
    options = {"shows_summary": True, "seals_thoughts": False}
    events, response = run("inside", ["Hm.</think>\n\nYes."], "stop", options)
    thoughts, message = response["output"]
    assert thoughts["summary"] == [{"type": "summary_text", "text": "Hm."}]
    assert "content" not in thoughts
    assert message["content"][0]["text"] == "Yes."
    kinds = [event["type"] for event in events if "summary" in event["type"]]
    assert kinds == [
        f"response.reasoning_summary_{kind}"
        for kind in ("part.added", "text.delta", "text.done", "part.done")
    ]
