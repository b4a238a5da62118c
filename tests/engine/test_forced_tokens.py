"""What a grammar leaves no choice about comes several tokens to a step; answers stay the same."""

import json
import random
from dataclasses import replace

import pytest

from streamserve.config import SpeculativeConfig
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.core.thinking import Thinking
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.null_runner import NullRunner
from tests.engine.fakes import EOS, NothingForced, collect, serving
from tests.engine.random_runner import RandomRunner
from tests.engine.random_schemas import random_schema

VOCAB_SIZE = 258
LOOKUP = SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_min=1, prompt_lookup_max=2)
FIELDS = ("location_of_the_station", "number_of_days", "include_wind_speed", "preferred_unit")
SCHEMA = {
    "type": "object",
    "properties": dict(
        zip(
            FIELDS,
            (
                {"type": "string", "maxLength": 9},
                {"type": "integer", "minimum": 0, "maximum": 99},
                {"type": "boolean"},
                {"enum": ["celsius", "fahrenheit"]},
            ),
            strict=True,
        )
    ),
    "required": list(FIELDS),
    "additionalProperties": False,
}


def output_of(kind: str, text: object, **options) -> StructuredOutput:
    text = text if isinstance(text, str) else json.dumps(text)
    return StructuredOutput(kind=GrammarKind(kind), text=text, **options)


async def answers(runner, requests, scheduler=Scheduler, num_blocks=64, **config):
    """What each is given, how many steps it took, and what was drafted."""
    async with serving(
        runner, scheduler_class=scheduler, num_blocks=num_blocks, **config
    ) as harness:
        for request in requests:
            await harness.engine.prepare(SamplingParams(**request))
        streams = [harness.submit(f"r{i}", **request) for i, request in enumerate(requests)]
        outputs = [await collect(stream) for stream in streams]
        stats = harness.engine.stats()
        return outputs, stats.num_steps, stats.speculation, stats.num_preemptions


def assert_same(some, others):
    names = "text", "token_ids", "usage", "logprobs", "finish_reason", "stop_reason"
    for one, other in zip(some, others, strict=True):
        for name in names:
            assert getattr(one, name) == getattr(other, name)


CASES = {
    "schema": {"structured_output": output_of("json_schema", SCHEMA)},
    "no white space": {
        "structured_output": output_of("json_schema", SCHEMA, whitespace_pattern="")
    },
    "regex": {"structured_output": output_of("regex", "(abcdef|xyz)[0-9]{2} is the (number|end)")},
    "choice": {"structured_output": output_of("choice", ["yes please", "no thanks", "nö"])},
    "lark": {"structured_output": output_of("lark", 'start: "begin " /[a-c]/ " and then " "end"')},
    "endless": {"structured_output": output_of("regex", "(abcd [0-9])+"), "max_tokens": 33},
    "stop string": {"structured_output": output_of("regex", "abcdef[0-9]{9}"), "stop": ("def",)},
    "stop id": {
        "structured_output": output_of("regex", "a(bcd)+"), "stop_token_ids": (1, ord("c"))
    },
    "min_tokens": {"structured_output": output_of("regex", "a(bcd)*"), "min_tokens": 9},
    "ignore_eos": {
        "structured_output": output_of("choice", ["abc"]), "ignore_eos": True, "max_tokens": 12
    },
}  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("speculative", [None, LOOKUP])
async def test_answers_are_the_same(depth, speculative):
    requests = [{"max_tokens": 200, **case} for case in CASES.values()]
    config = {"max_steps_in_flight": depth, "max_num_seqs": 16}
    plain, num_steps, stats, _ = await answers(
        RandomRunner(VOCAB_SIZE), requests, NothingForced, **config
    )
    assert stats.num_drafts == 0
    drafted, num_drafting_steps, stats, _ = await answers(
        RandomRunner(VOCAB_SIZE), requests, speculative=speculative, **config
    )
    assert_same(drafted, plain)
    assert num_drafting_steps < num_steps
    assert stats.num_forced_tokens > 50
    # Every byte is a token: the grammar's own spelling is the only one.
    if speculative is None:
        assert stats.num_forced_tokens == stats.num_accepted_tokens
    else:
        assert stats.num_draft_tokens > stats.num_accepted_tokens > stats.num_forced_tokens


async def test_guesses_that_a_grammar_forbids_are_wrong_and_no_more():
    """A lookup goes on with what stood before, where only something else may come."""
    request = {"structured_output": output_of("regex", "[ab]{12}[cd]{6}[ab]{6}"), "max_tokens": 99}
    plain, num_steps, _, _ = await answers(NullRunner((97, 98)), [request])
    drafted, num_drafting_steps, stats, _ = await answers(
        NullRunner((97, 98)), [request], speculative=LOOKUP
    )
    assert_same(drafted, plain)
    assert num_drafting_steps < num_steps - 5
    assert stats.num_forced_tokens == 0
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 5


async def test_a_schema_with_long_keys_takes_so_many_fewer_steps():
    request = {
        "structured_output": output_of("json_schema", SCHEMA, whitespace_pattern=""),
        "max_tokens": 200,
    }
    plain, num_steps, _, _ = await answers(RandomRunner(VOCAB_SIZE), [request], NothingForced)
    drafted, num_drafting_steps, stats, _ = await answers(RandomRunner(VOCAB_SIZE), [request])
    assert_same(drafted, plain)
    num_tokens = len(plain[0].token_ids)
    assert num_steps == num_tokens
    assert num_drafting_steps == num_tokens - stats.num_forced_tokens
    assert stats.num_forced_tokens > 0.75 * num_tokens


async def test_random_schemas():
    draw = random.Random(7)
    schemas = [random_schema(draw) for _ in range(24)]
    requests = [
        {"structured_output": output_of("json_schema", value), "max_tokens": 150}
        for value in schemas
    ]
    config = {"max_steps_in_flight": 2, "num_blocks": 300}
    plain, num_steps, _, _ = await answers(
        RandomRunner(VOCAB_SIZE), requests, NothingForced, **config
    )
    drafted, num_drafting_steps, stats, _ = await answers(
        RandomRunner(VOCAB_SIZE), requests, **config
    )
    assert_same(drafted, plain)
    assert num_drafting_steps < num_steps
    assert stats.num_forced_tokens == stats.num_accepted_tokens > 100


async def test_a_preempted_answer_goes_on():
    requests = [{"structured_output": CASES["no white space"]["structured_output"]}] * 4
    requests = [{"max_tokens": 110, **request} for request in requests]
    plain, *_ = await answers(RandomRunner(VOCAB_SIZE), requests, NothingForced)
    drafted, _, stats, num_preemptions = await answers(
        RandomRunner(VOCAB_SIZE), requests, num_blocks=14, max_steps_in_flight=2
    )
    assert num_preemptions > 0
    assert stats.num_forced_tokens > 0
    assert_same([replace(o, usage=None) for o in drafted], [replace(o, usage=None) for o in plain])


class Pairs(ByteTokenizer):
    """Ids 258 on stand for two bytes: most texts have several spellings."""

    tokens = (b"ab", b"cd", b"bc", b'":', b"ef")
    ids = range(258, 258 + len(tokens))
    vocab_size = 258 + len(tokens)

    def token_bytes(self, token_id):
        return self.tokens[token_id - 258] if token_id >= 258 else super().token_bytes(token_id)

    def decode(self, ids, *, skip_special_tokens=True):
        return b"".join(self.token_bytes(i) for i in ids if i not in (256, 257)).decode()

    def pieces(self, *, skip_special_tokens):
        table = super().pieces(skip_special_tokens=skip_special_tokens)
        return type(table)(lambda i: b"" if i in (256, 257) else self.token_bytes(i))


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_text_that_could_be_spelt_otherwise(depth):
    """What is forced is spelt as the tokenizer does, with drafts and without."""
    request = {"structured_output": output_of("regex", "(x?abcdef){30}"), "max_tokens": 300}
    config = {"tokenizer": Pairs(), "vocab_size": Pairs.vocab_size, "max_steps_in_flight": depth}
    runners = [RandomRunner(Pairs.vocab_size, frozenset(Pairs.ids)) for _ in range(2)]
    plain, num_steps, _, _ = await answers(runners[0], [request], NothingForced, **config)
    drafted, num_drafting_steps, stats, _ = await answers(runners[1], [request], **config)
    assert_same(drafted, plain)
    assert num_drafting_steps < num_steps
    assert set(plain[0].token_ids) & set(Pairs.ids)
    assert stats.num_draft_tokens == stats.num_forced_tokens > 50


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("speculative", [None, LOOKUP])
async def test_thoughts_that_are_ended_and_what_follows_them(is_open, depth, speculative):
    """The marks are forced where a budget or a grammar says so; guesses go across them."""
    thinking = Thinking(
        is_open=is_open,
        start_token_ids=tuple(b"<think>"),
        end_token_ids=tuple(b"</think>"),
        next_token_ids=tuple(b"\n\n"),
        budget=12,
    )
    requests = [
        {"thinking": thinking, "max_tokens": 50},
        {"thinking": thinking, "max_tokens": 90, "structured_output": output_of("regex", "abc+de")},
        {"thinking": replace(thinking, next_token_ids=(), budget=None), "max_tokens": 60},
    ]
    config = {"max_steps_in_flight": depth}
    plain, num_steps, _, _ = await answers(NullRunner(b"ab"), requests, NothingForced, **config)
    drafted, num_drafting_steps, stats, _ = await answers(
        NullRunner(b"ab"), requests, speculative=speculative, **config
    )
    assert_same(drafted, plain)
    assert "</think>\n\nabc" in drafted[1].text
    assert num_drafting_steps < num_steps
    assert stats.num_forced_tokens > 10
    assert stats.num_forced_tokens <= stats.num_accepted_tokens


async def test_answers_beside_it_that_follow_nothing_are_not_drafted():
    requests = [
        {"structured_output": output_of("choice", ["abcdefgh"])},
        {"max_tokens": 30, "ignore_eos": True},
    ]
    drafted, num_steps, stats, _ = await answers(NullRunner((97,)), requests)
    assert drafted[0].token_ids == [*b"abcdefgh", EOS]
    assert drafted[1].token_ids == [97] * 30
    assert num_steps == 31  # one waits for the other's prompt, which is its own
    assert stats.num_draft_tokens == 7
