"""The events of a message, however its text is cut, make the message that is not streamed."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from streamserve.api.answer_plan import AnswerParsing
from streamserve.api.extras import Prompt
from streamserve.api.message_wire import MessageEnvelope, MessagesWire
from streamserve.api.tool_fields import Tool, ToolUse
from streamserve.api.whole import Choice
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.reasoning import ThinkState

TOOLS = tuple(Tool(name, {}, {}) for name in ("add", "get_weather"))
PARSING = AnswerParsing(
    state=ThinkState.UNDECIDED,
    use=ToolUse(TOOLS, "auto"),
    tool_parser="hermes",
    are_calls_held=False,
    include_reasoning=True,
)
FRAGMENTS = [
    "<think>",
    "Hm.\n",
    "</think>",
    "\n\n",
    "Łódź 🙂",
    " ",
    '<tool_call>{"name": "add", "arguments": {"a": [1, 2]}}</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": "' + "x" * 300,
    '"}}</tool_call>',
    '<tool_call>{"name": "nobody"}</tool_call>',
    "<tool_call>",
]


def assembled(body):
    """What a client makes of a stream of events, as Anthropic's documentation describes it."""
    message, open_block, parts = None, None, {}
    for event in events_of(body):
        match event["type"]:
            case "message_start":
                assert message is None
                message = event["message"]
            case "content_block_start":
                assert open_block is None
                assert event["index"] == len(message["content"])
                open_block, parts = event["content_block"], {}
                message["content"].append(open_block)
            case "content_block_delta":
                assert event["index"] == len(message["content"]) - 1
                delta = event["delta"]
                kind = delta.pop("type")
                [(field, text)] = delta.items()
                assert KINDS[kind] == (open_block["type"], field)
                parts[field] = parts.get(field, "") + text
            case "content_block_stop":
                assert event["index"] == len(message["content"]) - 1
                close(open_block, parts)
                open_block = None
            case "message_delta":
                assert open_block is None
                message |= event["delta"]
                message["usage"] |= event["usage"]
    return message


KINDS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("thinking", "signature"),
    "input_json_delta": ("tool_use", "partial_json"),
}


def close(block, parts):
    for field, text in parts.items():
        if field != "partial_json":
            block[field] += text
            continue
        try:
            block["input"] = orjson.loads(text)
        except orjson.JSONDecodeError:
            assert block["input"] == {}


def events_of(body):
    events = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(orjson.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    return events


def without_ids(message):
    for block in message["content"]:
        if block["type"] == "tool_use":
            assert block.pop("id")
    return message


def output(text, usage, finish_reason=None, stop_reason=None):
    return RequestOutput(
        text=text,
        token_ids=[],
        usage=usage,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )


@given(
    pieces=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=8),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    parsing=st.sampled_from([PARSING, None]),
    end=st.sampled_from(
        [
            (FinishReason.STOP, None),
            (FinishReason.STOP, "END"),
            (FinishReason.STOP, 7),
            (FinishReason.LENGTH, None),
        ]
    ),
)
def test_events_assemble_to_the_message(pieces, cuts, parsing, end):
    text = "".join(pieces)
    wire = MessagesWire(MessageEnvelope("msg_1", "box", 100))

    def parser():
        return None if parsing is None else parsing.new(lambda _: b"")

    def usage():
        thought = None if parsing is None else 0
        return Usage(10, 7, 4, thought)

    frames = wire.frames(0, Prompt([]), parser())
    body, position, i = frames.role(Usage(10, 0, 4)), 0, 0
    while position < len(text):
        piece = text[position : position + cuts[i % len(cuts)]]
        position, i = position + len(piece), i + 1
        if frames.is_plain:
            body += frames.head + orjson.dumps(piece) + frames.tail
        else:
            frames.hold(output(piece, usage()))
            body += frames.text(piece, usage())
    frames.hold(output("", usage(), *end))
    body += frames.last(end[0], usage()) + wire.ending([])

    choice = Choice(Prompt([]), text, [], end[0], usage(), [], None, stop_reason=end[1])
    if (whole_parser := parser()) is not None:
        choice.events = whole_parser.feed(text) + whole_parser.finish()
        choice.has_calls = whole_parser.num_calls > 0
    whole = orjson.loads(wire.whole([choice]))
    assert without_ids(assembled(body)) == without_ids(whole)
    if parsing is None:
        assert whole["content"] == [{"type": "text", "text": text}]


def test_a_full_context_is_another_reason_than_max_tokens():
    envelope = MessageEnvelope("msg_1", "box", 20)
    reasons = [
        envelope.end(FinishReason.LENGTH, None, Usage(10, n), has_calls=False)["stop_reason"]
        for n in (9, 10)
    ]
    assert reasons == ["max_tokens", "model_context_window_exceeded"]
