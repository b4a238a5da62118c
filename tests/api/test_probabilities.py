"""What an answer says about probabilities and token ids, on the wire."""

from __future__ import annotations

import pytest

from streamserve.api.logprobs import CompletionLogprobs, TokenNames
from streamserve.core.plan import TokenLogprobs
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.byte_tokenizer import ByteTokenizer
from tests.api.harness import Api, text_of
from tests.engine.tokenizers_for_tests import byte_level, llama

START = 256  # the byte tokenizer's special token before a text
HEY = list(b"Hey")


def entries(token_ids):
    return [TokenLogprobs(token_id, -0.5, ((token_id, -0.5),)) for token_id in token_ids]


def merged(events):
    """The logprobs objects of a streamed completion, put together."""
    whole: dict[str, list] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                whole.setdefault(name, []).extend(values)
    return whole


async def test_a_prompts_logprobs_in_a_completion():
    async with Api().running() as api:
        answer = await api.complete(prompt=HEY, prompt_logprobs=2, max_tokens=1)
    [choice] = answer.json["choices"]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second["101"] == {"logprob": 0.0, "rank": 1, "decoded_token": "e"}
    assert set(second) == {"101", "0"}
    assert third["121"]["decoded_token"] == "y"
    assert choice["logprobs"] is None


async def test_a_prompts_logprobs_in_a_chat_stand_beside_the_choices():
    async with Api().running() as api:
        answer = await api.chat(prompt_logprobs=0, max_tokens=1)
    found = answer.json["prompt_logprobs"]
    assert found[0] is None
    assert [list(entry) for entry in found[1:]] == [[str(i)] for i in b"ser: Hi\nAssistant:"]
    assert "prompt_logprobs" not in answer.json["choices"][0]


async def test_a_cached_prompt_still_has_its_logprobs():
    prompt = list(range(65, 65 + 48))
    async with Api().running() as api:
        await api.complete(prompt=prompt, max_tokens=1)
        answer = await api.complete(prompt=prompt, max_tokens=1, prompt_logprobs=0)
        plain = await api.complete(prompt=prompt, max_tokens=1)
    assert answer.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert plain.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 47
    assert len(answer.json["choices"][0]["prompt_logprobs"]) == 48


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_echo_with_logprobs_has_the_prompt_first(is_streamed):
    async with Api().running() as api:
        answer = await api.complete(
            prompt="Hey", echo=True, logprobs=1, max_tokens=2, stream=is_streamed
        )
    if is_streamed:
        assert text_of(answer.events) == "Heyab"
        found = merged(answer.events)
    else:
        assert answer.json["choices"][0]["text"] == "Heyab"
        found = answer.json["choices"][0]["logprobs"]
    names = ByteTokenizer()
    start = names.token_text(START)
    assert found["tokens"] == [start, "H", "e", "y", "a", "b"]
    assert found["text_offset"] == [0, 0, 1, 2, 3, 4]  # the special token is not in the text
    assert found["token_logprobs"] == [None, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert found["top_logprobs"][:2] == [None, {"H": 0.0}]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("fields", [{"echo": True}, {"echo": True, "logprobs": 1}, {}])
async def test_a_prompt_may_be_all(fields, is_streamed):
    if is_streamed:
        fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    async with Api().running() as api:
        answer = await api.complete(prompt=["Hey", "Ho"], max_tokens=0, **fields)
    texts = ["Hey", "Ho"] if "echo" in fields else ["", ""]
    if is_streamed:
        assert answer.events[-1] == "[DONE]"
        events = answer.events[:-1]
        assert [text_of(events, index) for index in range(2)] == texts
        choices = [choice for event in events for choice in event["choices"]]
        ends = [choice for choice in choices if choice["finish_reason"] is not None]
        found = [c["logprobs"] for c in choices if c["logprobs"] and c["index"] == 0]
        usage = events[-1]["usage"]
    else:
        ends = answer.json["choices"]
        assert [choice["text"] for choice in ends] == texts
        found = [ends[0]["logprobs"]] if ends[0]["logprobs"] else []
        usage = answer.json["usage"]
    assert [choice["finish_reason"] for choice in ends] == ["length", "length"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 0)
    assert len(found) == ("logprobs" in fields)
    for logprobs in found:
        assert logprobs["tokens"][1:] == ["H", "e", "y"]
        assert logprobs["token_logprobs"] == [None, 0.0, 0.0, 0.0]
        assert logprobs["text_offset"] == [0, 0, 1, 2]


async def test_a_prompt_may_be_all_and_fill_the_context():
    async with Api().running() as api:
        fields = {"max_tokens": 0, "prompt_logprobs": 0, "include_timing": True}
        answer = await api.complete(prompt="x" * 600, truncate_prompt_tokens=-1, **fields)
        too_long = await api.complete(prompt="x" * 600, **fields)
        beams = await api.complete(**fields, use_beam_search=True)
        late = await api.complete(**fields, min_tokens=1)
    [choice] = answer.json["choices"]
    assert len(choice["prompt_logprobs"]) == answer.json["usage"]["prompt_tokens"] == 512
    assert choice["timing"]["first_token_ms"] is None
    assert choice["timing"]["total_ms"] is not None
    for refused, param in ((too_long, "prompt"), (beams, "max_tokens"), (late, "min_tokens")):
        assert (refused.status, refused.error["param"]) == (400, param)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_offsets_count_characters_not_tokens(is_streamed):
    data = "é€x".encode()
    async with Api(token_ids=data).running() as api:
        answer = await api.complete(logprobs=0, max_tokens=len(data), stream=is_streamed)
    if is_streamed:
        found = merged(answer.events)
    else:
        found = answer.json["choices"][0]["logprobs"]
    assert found["text_offset"] == [0, 0, 1, 1, 1, 2]
    assert found["tokens"] == ["\ufffd"] * 5 + ["x"]


async def test_the_bytes_of_a_character_are_spread_over_its_tokens():
    async with Api(token_ids="€".encode()).running() as api:
        answer = await api.chat(logprobs=True, max_tokens=3)
    content = answer.json["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "€"
    assert [len(entry["bytes"]) for entry in content] == [1, 1, 1]


async def test_tokens_may_be_named_by_their_ids():
    async with Api().running() as api:
        chat = await api.chat(
            logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True, max_tokens=1
        )
        completion = await api.complete(
            logprobs=1, return_tokens_as_token_ids=True, max_tokens=1, stream=True
        )
    [entry] = chat.json["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "token_id:97"
    assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:97", "token_id:0"]
    assert merged(completion.events)["top_logprobs"] == [{"token_id:97": 0.0}]


async def test_token_ids_of_a_whole_answer():
    async with Api(token_ids=(97, 98, 257)).running() as api:
        chat = await api.chat(return_token_ids=True)
        completion = await api.complete(prompt=[HEY, [72]], return_token_ids=True)
    assert chat.json["prompt_token_ids"] == list(b"User: Hi\nAssistant:")
    assert chat.json["choices"][0]["token_ids"] == [97, 98, 257]
    assert chat.json["choices"][0]["message"]["content"] == "ab"
    choices = completion.json["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [HEY, [72]]
    assert [choice["token_ids"] for choice in choices] == [[97, 98, 257]] * 2
    assert "prompt_token_ids" not in completion.json


async def test_token_ids_of_a_streamed_chat():
    data = "aé".encode()
    async with Api(token_ids=(*data, 257)).running() as api:
        answer = await api.chat(return_token_ids=True, stream=True)
    events = answer.events[:-1]
    assert events[0]["prompt_token_ids"] == list(b"User: Hi\nAssistant:")
    assert not any("prompt_token_ids" in event for event in events[1:])
    ids = [event["choices"][0].get("token_ids") for event in events]
    assert ids == [None, [97], list("é".encode()), [257], []]
    assert text_of(events) == "aé"


async def test_token_ids_of_a_streamed_completion():
    async with Api().running() as api:
        answer = await api.complete(prompt=HEY, return_token_ids=True, stream=True, max_tokens=2)
    choices = [event["choices"][0] for event in answer.events[:-1]]
    assert [choice["token_ids"] for choice in choices] == [[97], [98], []]
    assert choices[0]["prompt_token_ids"] == HEY
    assert "prompt_token_ids" not in choices[1]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, b"ey"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, b"ey"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, b"He"),
        ({"truncate_prompt_tokens": 9}, b"Hey"),
        ({"truncate_prompt_tokens": -1}, b"Hey"),
    ],
)
async def test_a_prompt_is_truncated(fields, kept):
    async with Api().running() as api:
        answer = await api.complete(
            prompt="Hey", add_special_tokens=False, return_token_ids=True, echo=True, max_tokens=1,
            **fields,
        )  # fmt: skip
    [choice] = answer.json["choices"]
    assert choice["prompt_token_ids"] == list(kept)
    assert choice["text"] == kept.decode() + "a"
    assert answer.json["usage"]["prompt_tokens"] == len(kept)


async def test_a_long_prompt_may_be_cut_to_what_the_model_takes():
    async with Api().running() as api:
        completion = await api.complete(prompt="x" * 600, truncate_prompt_tokens=-1, max_tokens=12)
        chat = await api.chat(
            messages=[{"role": "user", "content": "x" * 600}], truncate_prompt_tokens=-1
        )
    assert completion.json["usage"] == {
        "prompt_tokens": 500,
        "completion_tokens": 12,
        "total_tokens": 512,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert chat.json["usage"]["prompt_tokens"] == 511


@pytest.mark.parametrize("tokenizer", [byte_level(), llama()], ids=["bytes", "pieces"])
def test_offsets_say_where_a_token_begins_in_the_text(tokenizer):
    prompt, answer = "Hello 你好 👍", " Ünï 👩‍👩‍👧‍👦 h"
    prompt_ids = tokenizer.encode("<s>" + prompt, add_special_tokens=False)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    renderer = CompletionLogprobs(TokenNames(tokenizer), SamplingParams(), prompt_ids)
    shown = tokenizer.decode(prompt_ids)
    first = renderer.echo(shown, entries(prompt_ids[1:]))
    then = renderer.render(entries(ids))
    whole = tokenizer.decode([*prompt_ids, *ids])
    offsets = first["text_offset"] + then["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[:2] == [0, 0]
    tokens = first["tokens"] + then["tokens"]
    for offset, token in list(zip(offsets, tokens, strict=True))[2:]:
        if "\ufffd" not in token:
            assert whole.startswith(token, offset)
