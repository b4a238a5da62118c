"""What a request is told about itself, if it asks: its timing, and where it stands."""

import asyncio
import json
from itertools import pairwise

import pytest

from streamserve.api.progress import ProgressComments, comment
from streamserve.api.timing import TokenTimes
from streamserve.engine.outputs import Usage
from streamserve.engine.progress import ProgressBoard, RequestProgress
from streamserve.engine.stream import RequestStream
from tests.api.harness import Api, chat_body, until
from tests.api.scripted import scripted

KEYS = {
    "queue_ms",
    "prefill_ms",
    "first_token_ms",
    "inter_token_p50_ms",
    "inter_token_p99_ms",
    "total_ms",
    "cached_tokens",
}


def check(timing, *, has_gaps=True):
    assert set(timing) == KEYS
    assert 0 <= timing["queue_ms"] <= timing["first_token_ms"] <= timing["total_ms"]
    assert 0 <= timing["prefill_ms"] <= timing["first_token_ms"]
    if has_gaps:
        assert 0 <= timing["inter_token_p50_ms"] <= timing["inter_token_p99_ms"]
    else:
        assert timing["inter_token_p50_ms"] is timing["inter_token_p99_ms"] is None


@pytest.mark.parametrize(
    "fields", [{"stream_options": {"include_timing": True}}, {"include_timing": True}]
)
async def test_a_stream_ends_with_its_timing(fields):
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=5, **fields)
    *chunks, last, done = answer.events
    assert done == "[DONE]"
    assert last["choices"][0]["finish_reason"] == "length"
    check(last["choices"][0]["timing"])
    assert all("timing" not in chunk["choices"][0] for chunk in chunks)


async def test_timing_and_usage_together():
    options = {"include_timing": True, "include_usage": True, "continuous_usage_stats": True}
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=5, stream_options=options)
    *chunks, last, usage, _ = answer.events
    check(last["choices"][0]["timing"])
    assert usage["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in [*chunks, last]]
    assert counts == [0, 1, 2, 3, 4, 5, 5]


async def test_a_whole_answer_has_it_in_each_choice():
    async with Api().running() as api:
        chat = await api.chat(max_tokens=5, include_timing=True)
        two = await api.complete(prompt=["Hi", "Ho"], max_tokens=1, include_timing=True)
        without = await api.chat(max_tokens=1)
    check(chat.json["choices"][0]["timing"])
    for choice in two.json["choices"]:
        check(choice["timing"], has_gaps=False)
    assert "timing" not in without.json["choices"][0]


async def test_each_of_many_answers_has_its_own():
    async with Api().running() as api:
        best = await api.chat(max_tokens=5, n=2, best_of=3, include_timing=True)
        beams = await api.chat(max_tokens=5, n=2, use_beam_search=True, include_timing=True)
        answer = await api.chat(max_tokens=5, n=2, stream=True, include_timing=True)
    for whole, has_gaps in ((best, True), (beams, False)):
        assert len(whole.json["choices"]) == 2
        for choice in whole.json["choices"]:
            check(choice["timing"], has_gaps=has_gaps)
    choices = [chunk["choices"][0] for chunk in answer.events[:-1]]
    timed = {choice["index"]: choice["timing"] for choice in choices if "timing" in choice}
    assert sorted(timed) == [0, 1]
    for timing in timed.values():
        check(timing)


async def test_an_answer_that_is_parsed_has_it_too():
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    asked = {"tools": [{"type": "function", "function": {"name": "add"}}], "include_timing": True}
    async with scripted(call).running() as api:
        whole = await api.chat(**asked)
        streamed = await api.chat(stream=True, **asked)
    *_, last, _ = streamed.events
    # A call this short is held until it is whole, and leaves in one piece.
    for content, has_gaps in ((whole.json, True), (last, False)):
        [choice] = content["choices"]
        assert choice["finish_reason"] == "tool_calls"
        check(choice["timing"], has_gaps=has_gaps)


async def test_cached_tokens_are_told():
    prompt = list(range(64))
    async with Api().running() as api:
        for _ in range(2):
            answer = await api.complete(prompt=prompt, max_tokens=1, include_timing=True)
    assert answer.json["choices"][0]["timing"]["cached_tokens"] == 63


async def test_the_numbers_are_those_of_the_clock():
    now = [10.0]
    times = TokenTimes(lambda: now[0], arrival=10.0)
    stream = RequestStream("a", 3, arrival_time=10.0, on_close=lambda _: None)
    stream.timings.first_scheduled = 10.25
    stream.timings.first_token = 11.0
    for time in (11.25, 11.5, 11.625, 13.625):
        now[0] = time
        times.stamp()
    now[0] = 14.0
    assert times.content(stream, Usage(3, 4, 2)) == {
        "queue_ms": 250.0,
        "prefill_ms": 750.0,
        "first_token_ms": 1250.0,
        "inter_token_p50_ms": 250.0,
        "inter_token_p99_ms": 2000.0,
        "total_ms": 4000.0,
        "cached_tokens": 2,
    }


async def comment_that(reader, is_wanted):
    """The first of a response's progress comments that is wanted."""
    async with asyncio.timeout(60):
        while True:
            line = await reader.readline()
            assert line, "the response has ended"
            if line.startswith(b": progress "):
                comment = json.loads(line.removeprefix(b": progress "))
                if is_wanted(comment):
                    return comment


async def ask(address, **options):
    reader, writer = await asyncio.open_connection(*address)
    body = json.dumps(chat_body(stream=True, max_tokens=2, stream_options=options)).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    await writer.drain()
    return reader, writer


async def test_a_stream_that_waits_says_where_it_stands():
    """Eight have a seat and their steps are held: the next ones wait."""
    api = Api(is_held=True)
    async with api.serving() as address:
        connections = [await ask(address, include_progress=True) for _ in range(8)]
        await until(lambda: api.engine.stats().num_running == 1)
        await until(lambda: api.engine.stats().num_waiting == 7)
        await api.pace.step()  # of the first alone
        await until(lambda: api.engine.stats().num_running == 8)
        for num_waiting in (1, 2):
            connections.append(await ask(address, include_progress=True))
            await until(lambda n=num_waiting: api.engine.stats().num_waiting == n)
        quiet = await ask(address)
        place = {"index": 0, "state": "queued", "place": 2}
        await comment_that(connections[9][0], lambda comment: comment == place)
        seated = await comment_that(
            connections[7][0], lambda comment: comment["state"] == "prefill"
        )
        assert seated["computed_tokens"] == seated["prompt_tokens"] > 0
        api.pace.let_go()
        for reader, _ in [*connections, quiet]:
            rest = await reader.read()
            assert b"data: [DONE]" in rest
            assert b"progress" not in rest[rest.index(b"data: {") :]
            if reader is quiet[0]:
                assert b"progress" not in rest
        for _, writer in [*connections, quiet]:
            writer.close()
            await writer.wait_closed()


async def test_only_what_has_changed_is_said_and_only_until_the_first_token():
    stream = RequestStream("a", 10, arrival_time=0.0, on_close=lambda _: None)
    stands = [RequestProgress(2, 0, 10)]
    written = []
    has_room = [True]

    def write_now(body):
        if has_room[0]:
            written.append(body)
        return has_room[0]

    comments = ProgressComments([stream], lambda _: stands[0], write_now)
    said = [RequestProgress(2, 0, 10), RequestProgress(1, 0, 10), RequestProgress(0, 4, 10)]
    comments.start()
    comments.start()  # as the timer does
    stands[0] = said[1]
    comments.start()
    has_room[0] = False
    stands[0] = RequestProgress(0, 2, 10)
    comments.start()
    has_room[0] = True
    stands[0] = said[2]
    comments.start()
    stream.timings.first_token = 1.0
    stands[0] = RequestProgress(0, 10, 10)
    comments.start()
    comments.stop()
    assert written == [comment(0, progress) for progress in said]
    assert written[2] == (
        b': progress {"index":0,"state":"prefill","computed_tokens":4,"prompt_tokens":10}\n\n'
    )


async def test_the_queue_is_sorted_at_most_every_tenth_of_a_second():
    now = [0.0]
    async with Api(is_held=True).running() as api:
        tasks = [asyncio.create_task(api.chat(max_tokens=2)) for _ in range(12)]
        await until(lambda: api.engine.stats().num_waiting == 11)
        await api.pace.step()  # of the first alone
        await until(lambda: api.engine.stats().num_waiting == 4)
        board = ProgressBoard(api.engine._live, lambda: now[0])
        places = [board.of(request_id).place for request_id in api.engine._live]
        assert places == [0] * 8 + [1, 2, 3, 4]
        assert board.of("nobody") is None
        keys = board._waiting_keys
        for later in (0.05, 0.099):
            now[0] = later
            board.of(next(reversed(api.engine._live)))
            assert board._waiting_keys is keys
        now[0] = 0.1
        board.of(next(reversed(api.engine._live)))
        assert board._waiting_keys is not keys
        assert all(a <= b for a, b in pairwise(board._waiting_keys))
        api.pace.let_go()
        for task in tasks:
            assert (await task).status == 200
