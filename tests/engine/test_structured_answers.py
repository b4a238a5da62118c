"""Whatever the model draws, an answer that ends by itself is what its grammar says."""

import gc
import json
import random
import re
from functools import partial

import jsonschema
import pytest

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.core.step_time import StepTimeModel
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.grammar_masks import RequestMatcher
from streamserve.errors import EngineError, InvalidParameterError
from tests.engine.fakes import EOS, collect, patient_grammars, serving
from tests.engine.random_runner import RandomRunner
from tests.engine.random_schemas import random_schema
from tests.unit.machines import Machine

VOCAB_SIZE = 258


def schema(value, **options) -> StructuredOutput:
    text = json.dumps(value, ensure_ascii=False)
    return StructuredOutput(kind=GrammarKind.JSON_SCHEMA, text=text, **options)


def grammar(kind: str, text: str) -> StructuredOutput:
    return StructuredOutput(kind=GrammarKind(kind), text=text)


async def submit(harness, output, request_id="r", **params):
    request = {"structured_output": output, "max_tokens": 400, **params}
    await harness.engine.prepare(SamplingParams(**request))
    return harness.submit(request_id, **request)


async def answer(harness, output, request_id="r", **params):
    return await collect(await submit(harness, output, request_id, **params))


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
async def test_random_schemas_are_followed(max_steps_in_flight):
    draw = random.Random(max_steps_in_flight)
    schemas = [random_schema(draw) for _ in range(120)]
    num_ended = 0
    runner = RandomRunner(VOCAB_SIZE)
    async with serving(runner, max_steps_in_flight=max_steps_in_flight, num_blocks=400) as harness:
        for first in range(0, len(schemas), 8):
            batch = schemas[first : first + 8]
            asked = [{"structured_output": schema(value), "max_tokens": 400} for value in batch]
            for request in asked:
                await harness.engine.prepare(SamplingParams(**request))
            streams = [harness.submit(f"r{first + i}", **r) for i, r in enumerate(asked)]
            for value, stream in zip(batch, streams, strict=True):
                output = await collect(stream)
                if output.finish_reason is FinishReason.STOP:
                    num_ended += 1
                    jsonschema.validate(json.loads(output.text), value)
    assert num_ended > 90
    assert max(runner.num_masks) == 8


async def test_an_answer_that_has_ended_leaves_no_grammar_behind():
    def num_matchers():
        gc.collect()
        return sum(isinstance(found, RequestMatcher) for found in gc.get_objects())

    num_before = num_matchers()
    async with serving(RandomRunner(VOCAB_SIZE)) as harness:
        await answer(harness, grammar("regex", "ab*c"))
        (await submit(harness, grammar("regex", "[a-c]+"), "left")).close()
        await answer(harness, None, "after")
        assert num_matchers() == num_before


CHOICES = grammar("choice", '["yes", "yes please", "nö", "\\"\\n\\\\", "😀"]')
SENTENCES = [
    (grammar("regex", r"\d{3}-[a-f]{2,5}"), r"[0-9]{3}-[a-f]{2,5}"),
    (grammar("regex", "(é|😀|名前)+x/y"), "(é|😀|名前)+x/y"),
    (grammar("regex", "^a[^b]c$"), "a[^b]c"),
    (CHOICES, 'yes( please)?|nö|"\n\\\\|😀'),
    (grammar("lark", 'start: "a" pair+\npair: "<" /[0-9]/ ">"'), "a(<[0-9]>)+"),
    (grammar("lark", 'root ::= "a" pair+\npair ::= "<" [0-9] ">"'), "a(<[0-9]>)+"),
    (grammar("lark", 'start: "f" %json {"type": "boolean"}'), "f(true|false)"),
]  # fmt: skip


@pytest.mark.parametrize(("output", "pattern"), SENTENCES)
async def test_sentences_of_other_grammars(output, pattern):
    async with serving(RandomRunner(VOCAB_SIZE), max_steps_in_flight=2) as harness:
        for i in range(5):
            given = await answer(harness, output, f"r{i}")
            assert given.finish_reason is FinishReason.STOP
            assert re.fullmatch(pattern, given.text), given.text


async def test_white_space_is_bounded_or_as_told():
    value = {"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3}
    blank = RandomRunner(VOCAB_SIZE, liked=frozenset(b" \n\t"))
    async with serving(blank) as harness:
        free = await answer(harness, schema(value), "a", max_tokens=480)
        blanks = r"([ \t]{1,4}|\r?\n[ \t]{0,40})?"
        assert re.fullmatch(
            "~".join([r"\[", "1", ",", "1", ",", "1", "]"]).replace("~", blanks), free.text
        )
        assert len(free.text) > len("[1,1,1]")
        none = await answer(harness, schema(value, whitespace_pattern=""), "b")
        assert none.text == "[1,1,1]"
        some = await answer(harness, schema(value, whitespace_pattern=" ?"), "c")
        assert re.fullmatch(r"\[ ?1 ?, ?1 ?, ?1 ?]", some.text)


async def test_only_the_end_comes_behind_a_whole_answer():
    a = grammar("choice", '["a"]')
    async with serving(RandomRunner(VOCAB_SIZE), max_steps_in_flight=2) as harness:
        plain = await answer(harness, a, "plain")
        assert (plain.text, plain.token_ids, plain.stop_reason) == ("a", [97, EOS], None)
        # min_tokens cannot make it longer, a stop id may end it, ignore_eos has ends only.
        early = await answer(harness, a, "early", min_tokens=5)
        assert (early.text, early.token_ids) == ("a", [97, EOS])
        stopped = await answer(harness, a, "stopped", stop_token_ids=(1,), ignore_eos=True)
        assert stopped.text == "a"
        assert stopped.stop_reason == 1
        endless = await answer(harness, a, "endless", ignore_eos=True, max_tokens=4)
        assert endless.token_ids == [97, EOS, EOS, EOS]
        assert endless.finish_reason is FinishReason.LENGTH


async def test_min_tokens_make_an_answer_longer_where_that_is_possible():
    runner = RandomRunner(VOCAB_SIZE, liked=frozenset({EOS, 1}))
    async with serving(runner) as harness:
        for i in range(5):
            output = grammar("regex", "a+")
            given = await answer(harness, output, f"r{i}", min_tokens=7, stop_token_ids=(1,))
            assert given.text.count("a") >= 7
            assert given.finish_reason is FinishReason.STOP


async def test_max_tokens_and_stop_strings_cut():
    async with serving(RandomRunner(VOCAB_SIZE), max_steps_in_flight=2) as harness:
        cut = await answer(harness, grammar("regex", "x{50}"), "cut", max_tokens=20)
        assert (cut.text, cut.finish_reason) == ("x" * 20, FinishReason.LENGTH)
        stopped = await answer(harness, grammar("choice", '["one, two"]'), "s", stop=(", ",))
        assert (stopped.text, stopped.stop_reason) == ("one", ", ")


async def test_those_without_a_grammar_are_free_beside_those_with_one():
    runner = RandomRunner(VOCAB_SIZE)
    async with serving(runner, max_steps_in_flight=2) as harness:
        alone = await harness.answer("free", max_tokens=30)
        assert max(runner.num_masks) == 0
        masked = await submit(harness, grammar("regex", "[A-Z]{40}"), "masked")
        free = harness.submit("free", max_tokens=30)
        assert (await collect(free)).text == alone.text
        assert re.fullmatch("[A-Z]{40}", (await collect(masked)).text)


async def test_preemption_does_not_move_a_request_in_its_grammar():
    output = schema({"type": "array", "items": {"type": "integer"}, "minItems": 30})
    texts = []
    for num_blocks in (200, 24):
        async with serving(RandomRunner(VOCAB_SIZE), num_blocks=num_blocks) as harness:
            streams = [
                await submit(harness, output, f"r{i}", max_tokens=150, ignore_eos=True)
                for i in range(4)
            ]
            texts.append([(await collect(stream)).text for stream in streams])
            num_preemptions = harness.engine.stats().num_preemptions
    assert num_preemptions > 0
    assert texts[0] == texts[1]


async def test_masks_are_filled_while_the_next_forward_is_in_flight():
    launched = []

    class Watched(RandomRunner):
        def launch(self, plan):
            launched.append(plan.step_id)
            super().launch(plan)

        def sample(self, step_id, masks=None):
            launched.append(-step_id)
            return super().sample(step_id, masks)

    rows_that_cost_what_they_yield = Machine(lambda rows: 0.01 * rows).profile()
    scheduler = partial(Scheduler, step_time=StepTimeModel(rows_that_cost_what_they_yield))
    async with serving(
        Watched(VOCAB_SIZE), scheduler_class=scheduler, max_steps_in_flight=2
    ) as harness:
        await answer(harness, grammar("choice", '["abc"]'))
    # Step 2 is launched before the ids of step 1 are known, and sampled before 3 is launched.
    assert launched[:7] == [0, 0, 1, -1, 2, -2, 3]


async def test_a_grammar_that_fails_ends_its_request_alone():
    class Wrong(RandomRunner):
        def _draw(self, scheduled, mask):
            if scheduled.request_id == "wrong" and scheduled.output_position == 3:
                return 1
            return super()._draw(scheduled, mask)

    async with serving(Wrong(VOCAB_SIZE), max_steps_in_flight=2) as harness:
        right = await submit(harness, grammar("regex", "a{20}"), "right")
        wrong = await submit(harness, grammar("regex", "a{20}"), "wrong")
        with pytest.raises(EngineError, match="could not follow its grammar"):
            await collect(wrong)
        assert (await collect(right)).text == "a" * 20


async def test_tokens_of_several_characters_and_parts_of_them():
    """Ids 258 on stand for more than a byte, or for part of a character."""
    tokens = ['{"', '":', "é😀".encode()[:4], "名前".encode()[1:], "ab", '"}', "true", b"\xff"]

    class Pieces(ByteTokenizer):
        vocab_size = 258 + len(tokens)

        def token_bytes(self, token_id):
            if token_id < 258:
                return super().token_bytes(token_id)
            token = tokens[token_id - 258]
            return token if isinstance(token, bytes) else token.encode()

        def decode(self, ids, *, skip_special_tokens=True):
            return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

        def pieces(self, *, skip_special_tokens):
            table = super().pieces(skip_special_tokens=skip_special_tokens)
            return type(table)(lambda i: b"" if i in (256, 257) else self.token_bytes(i))

    tokenizer = Pieces()
    runner = RandomRunner(tokenizer.vocab_size, liked=frozenset(range(258, 300)) | {34, EOS})
    value = {"type": "object", "properties": {"名前": {"type": "string", "maxLength": 6}}}
    value |= {"required": ["名前"], "additionalProperties": False}
    used = set()
    async with serving(runner, tokenizer=tokenizer, max_steps_in_flight=2) as harness:
        for i in range(40):
            given = await answer(harness, schema(value), f"r{i}")
            assert given.finish_reason is FinishReason.STOP
            jsonschema.validate(json.loads(given.text), value)
            used |= set(given.token_ids)
    assert used >= {258, 260, 261, 262}
    assert 265 not in used


async def test_a_vocabulary_that_the_model_pads():
    """Ids beyond the tokenizer's are never allowed."""
    tokenizer = ByteTokenizer()
    grammars = patient_grammars(tokenizer, vocab_size=300)
    output = grammar("regex", "(.|\\n){200}")
    await grammars.compile(output)
    mask = grammars.matcher(output).compute_bitmask()
    allowed = {i for i in range(300) if mask[i >> 3] >> (i & 7) & 1}
    assert len(mask) * 8 >= 300
    assert allowed <= set(range(256))
    assert ord("a") in allowed
    grammars.close()


async def test_a_tokenizer_whose_bytes_are_unknown_is_refused():
    class Opaque(ByteTokenizer):
        def pieces(self, *, skip_special_tokens):
            return None

    grammars = patient_grammars(Opaque())
    with pytest.raises(InvalidParameterError, match="not supported with this model's tokenizer"):
        await grammars.compile(grammar("regex", "a"))
