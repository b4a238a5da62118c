"""Several answers to one prompt, on the wire."""

from __future__ import annotations

import itertools

import pytest

from streamserve.core.plan import ModelRunnerOutput, TokenLogprobs
from streamserve.engine.null_runner import NullRunner
from tests.api.harness import (
    TEXT,
    Api,
    BrokenRunner,
    Exchange,
    chat_body,
    events_of,
    text_of,
    until,
)

LETTERS = range(97, 123)


class ChoiceRunner(NullRunner):
    """Choice ``i`` of a request says its ``i``-th letter; the likelier, the more of ``ranks``."""

    def __init__(self, ranks=(0, 3, 1, 2), **options) -> None:
        super().__init__(TEXT, **options)
        self._ranks = ranks
        self._choice_of: dict[str, int] = {}

    def launch(self, plan) -> None:
        super().launch(plan)
        for new in plan.new_requests:
            self._choice_of[new.request_id] = new.choice_index

    def _output_of(self, plan, masks):
        output = super()._output_of(plan, masks)
        sampled, logprobs = [], []
        for scheduled in plan.scheduled:
            choice = self._choice_of[scheduled.request_id]
            token_ids = [97 + choice] if scheduled.sample else []
            sampled.append(token_ids)
            value = -1.0 / (1 + self._ranks[choice % len(self._ranks)])
            logprobs.append([TokenLogprobs(i, value, ()) for i in token_ids])
        has_logprobs = output.logprobs is not None
        return ModelRunnerOutput(plan.step_id, sampled, logprobs if has_logprobs else None)


class BeamTreeRunner(NullRunner):
    """After every token the same letters are likely, each 0.5 less than the one before."""

    def _logprobs_of(self, token_ids, num_top):
        top = tuple((letter, -0.5 * (i + 1)) for i, letter in enumerate(LETTERS))[: num_top or 0]
        return [TokenLogprobs(token_id, -0.5, top) for token_id in token_ids]


async def test_n_answers_of_a_chat_count_the_prompt_once():
    async with Api(runner=ChoiceRunner()).running() as api:
        answer = await api.chat(n=3, max_tokens=2)
    choices = answer.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in choices] == ["aa", "bb", "cc"]
    assert answer.json["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 6,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_n_answers_to_each_of_several_prompts():
    async with Api(runner=ChoiceRunner()).running() as api:
        answer = await api.complete(
            prompt=["a", "bcd"], n=2, max_tokens=2, add_special_tokens=False, echo=True
        )
    choices = answer.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == ["aaa", "abb", "bcdaa", "bcdbb"]
    assert answer.json["usage"]["prompt_tokens"] == 4
    assert answer.json["usage"]["completion_tokens"] == 8


async def test_streams_of_several_answers_interleave():
    async with Api(runner=ChoiceRunner()).running() as api:
        answer = await api.chat(n=3, max_tokens=4, stream=True)
    *chunks, done = answer.events
    assert done == "[DONE]"
    assert answer.body.count(b"[DONE]") == 1
    indices = [chunk["choices"][0]["index"] for chunk in chunks]
    assert len(list(itertools.groupby(indices))) > 3
    for index, text in enumerate(("aaaa", "bbbb", "cccc")):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(chunks, index) == text
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]


async def test_the_usage_of_several_streams_counts_the_prompt_once():
    async with Api(runner=ChoiceRunner()).running() as api:
        answer = await api.complete(
            prompt=["a", "bcd"],
            n=2,
            max_tokens=3,
            add_special_tokens=False,
            stream=True,
            stream_options={"include_usage": True},
        )
    usage = answer.events[-2]
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 4
    assert usage["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("fields", [{}, {"logprobs": 0}])
async def test_the_best_of_several_are_the_likeliest(fields):
    async with Api(runner=ChoiceRunner(ranks=(0, 3, 1, 2))).running() as api:
        answer = await api.complete(n=2, best_of=4, max_tokens=2, **fields)
    choices = answer.json["choices"]
    assert [choice["text"] for choice in choices] == ["bb", "dd"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert answer.json["usage"]["completion_tokens"] == 4
    if fields:
        assert choices[0]["logprobs"]["token_logprobs"] == [-0.25, -0.25]
    else:
        assert choices[0]["logprobs"] is None


async def test_as_many_candidates_as_answers_may_stream():
    async with Api(runner=ChoiceRunner()).running() as api:
        answer = await api.complete(n=2, best_of=2, max_tokens=2, stream=True)
    assert [text_of(answer.events, i) for i in range(2)] == ["aa", "bb"]


@pytest.mark.parametrize("is_chat", [True, False])
async def test_a_beam_search(is_chat):
    fields = {"use_beam_search": True, "n": 2, "max_tokens": 2, "ignore_eos": True}
    async with Api(runner=BeamTreeRunner(TEXT)).running() as api:
        answer = await (api.chat(**fields) if is_chat else api.complete(**fields))
        wide = await api.complete(**{**fields, "n": 1, "best_of": 3}, logprobs=2)
    texts = [c["message"]["content"] if is_chat else c["text"] for c in answer.json["choices"]]
    assert texts == ["aa", "ab"]
    assert answer.json["usage"]["completion_tokens"] == 4
    assert answer.json["choices"][0]["finish_reason"] == "length"
    [best] = wide.json["choices"]
    assert best["text"] == "aa"
    assert best["logprobs"]["top_logprobs"] == [{"a": -0.5, "b": -1.0}] * 2


async def test_the_models_own_defaults_have_no_say_in_a_beam_search():
    defaults = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    async with Api(runner=BeamTreeRunner(TEXT), generation_config=defaults).running() as api:
        answer = await api.complete(use_beam_search=True, best_of=2, max_tokens=2)
    assert answer.status == 200


async def test_every_choice_echoes_the_prompts_logprobs():
    async with Api().running() as api:
        whole = await api.complete(prompt="Hey", n=2, echo=True, logprobs=0, max_tokens=1)
        streamed = await api.complete(
            prompt="Hey", n=2, echo=True, logprobs=0, max_tokens=1, stream=True
        )
    for choice in whole.json["choices"]:
        assert choice["logprobs"]["token_logprobs"] == [None, 0.0, 0.0, 0.0, 0.0]
    for index in range(2):
        assert text_of(streamed.events, index) == "Heya"


@pytest.mark.parametrize(
    "fields",
    [{"n": 4}, {"n": 4, "stream": True}, {"n": 2, "best_of": 4}, {"use_beam_search": True, "n": 3}],
)
async def test_who_leaves_frees_all_answers(fields):
    runner = BeamTreeRunner(TEXT)
    api = Api(runner=runner, is_held=True)
    runner._pace = api.pace
    async with api.running():
        body = chat_body(max_tokens=100, **fields)
        exchange = Exchange(api.app, "POST", "/v1/chat/completions", body)
        await api.pace.step()
        await api.pace.step()
        assert api.num_used_blocks > 0
        exchange.leave()
        api.pace.let_go()
        await exchange.finished()
        await until(lambda: api.engine.is_idle)
        assert api.num_used_blocks == 0


async def test_an_error_of_one_answer_ends_the_stream_of_all():
    async with Api(runner=BrokenRunner(3)).running() as api:
        answer = await api.chat(n=3, max_tokens=10, stream=True)
        whole = await api.chat(n=3, max_tokens=10)
    events = events_of(answer.body)
    assert events[-1]["error"]["status"] == 500
    assert "[DONE]" not in events
    assert whole.status == 503  # by then it is known that no step can run
