"""Free text with tags in it: whatever a model draws, what follows a trigger is the tag's."""

import json
import random
import re

import jsonschema
import pytest

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.parsers.harmony import MARKERS
from streamserve.errors import InvalidParameterError
from tests.engine.fakes import EOS, collect, patient_grammars, serving
from tests.engine.random_runner import RandomRunner
from tests.engine.random_schemas import random_schema

VOCAB_SIZE = 258
WORD = {"type": "regex", "pattern": "[a-c]{1,4}"}


def tag(begin, content, end):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def structural(tree) -> StructuredOutput:
    return StructuredOutput(kind=GrammarKind.STRUCTURAL_TAG, text=json.dumps(tree))


def triggered(triggers, tags, *, at_least_one=False, stop_after_first=False):
    flags = {"at_least_one": at_least_one, "stop_after_first": stop_after_first}
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags, **flags}


async def answer(harness, output, request_id, **params):
    request = {"structured_output": output, "max_tokens": 300, **params}
    await harness.engine.prepare(SamplingParams(**request))
    return await collect(harness.submit(request_id, **request))


def random_tags(draw):
    """Triggers, and tags whose ends JSON of their schemas cannot hold."""
    triggers = draw.sample(["<", "[[", "é", "§\n"], draw.randrange(1, 4))
    tags = []
    for trigger in triggers:
        for name in draw.sample("xyz", draw.randrange(1, 3)):
            content = WORD
            if draw.random() < 0.7:
                content = {"type": "json_schema", "json_schema": random_schema(draw)}
            tags.append(tag(trigger + name, content, "\x01>"))
    return triggers, tags


def obeys(text, triggers, tags, *, is_whole):
    """Go through a text from its first trigger to the next; count the tags."""
    count = 0
    while found := re.search("|".join(map(re.escape, triggers)), text):
        text = text[found.start() :]
        here = [tag for tag in tags if text.startswith(tag["begin"])]
        if not is_whole and "\x01>" not in text:
            return count
        assert here, text
        begin, content = here[0]["begin"], here[0]["content"]
        inside, end, text = text[len(begin) :].partition("\x01>")
        assert end, inside
        if content is WORD:
            assert re.fullmatch(WORD["pattern"], inside)
        else:
            jsonschema.validate(json.loads(inside), content["json_schema"])
        count += 1
    return count


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
async def test_random_mixes_of_text_and_tags_obey(max_steps_in_flight):
    draw = random.Random(max_steps_in_flight)
    liked = frozenset("<[é§\nxyz\x01>".encode() + b'"]}:,0') | {EOS}
    num_tags = num_ended = 0
    runner = RandomRunner(VOCAB_SIZE, liked)
    async with serving(runner, max_steps_in_flight=max_steps_in_flight, num_blocks=400) as harness:
        for i in range(60):
            triggers, tags = random_tags(draw)
            tree = triggered(triggers, tags)
            given = await answer(harness, structural(tree), f"r{i}", min_tokens=60)
            is_whole = given.finish_reason is FinishReason.STOP
            num_ended += is_whole
            num_tags += obeys(given.text, triggers, tags, is_whole=is_whole)
    assert num_ended > 20
    assert num_tags > 60


BOOL = {"type": "json_schema", "json_schema": {"type": "boolean"}}
HI = {"type": "const_string", "value": "Hi"}
TAGS = [tag("<a>", WORD, "</a>"), tag("<b>", BOOL, "</b>")]
A, B = "<a>[a-c]{1,4}</a>", "<b>(true|false)</b>"
FREE = r"[^<]*(<(?![ab])[^<]*)*"
TREES = [
    (triggered(["<a", "<b"], TAGS, at_least_one=True, stop_after_first=True), f"{A}|{B}"),
    (triggered(["<a", "<b"], TAGS, at_least_one=True), f"({A}|{B})({FREE}({A}|{B}))*{FREE}"),
    (triggered(["<a", "<b"], TAGS, stop_after_first=True), f"{FREE}({A}|{B})?"),
    (tag("[", {"type": "any_text"}, "]"), r"\[[^]]*]"),
    (tag("[", {"type": "any_text"}, ["]", "!"]), r"\[[^]!]*[]!]"),
    (tag("[", WORD, ["]", "!"]), r"\[[a-c]{1,4}[]!]"),
    ({"type": "sequence", "elements": [HI, BOOL, WORD]}, "Hi(true|false)[a-c]{1,4}"),
    ({"type": "or", "elements": [HI, BOOL]}, "Hi|true|false"),
    ({"type": "grammar", "grammar": 'root ::= "x" [0-9]+ "y"'}, "x[0-9]+y"),
    (
        {"type": "tags_with_separator", "tags": TAGS, "separator": ", ", "at_least_one": True,
         "stop_after_first": False},
        f"({A}|{B})(, ({A}|{B}))*",
    ),
    (
        {"type": "tags_with_separator", "tags": TAGS, "separator": ", ", "at_least_one": False,
         "stop_after_first": True},
        f"({A}|{B})?",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "pattern"), TREES)
async def test_every_kind_of_format(tree, pattern):
    liked = frozenset(b"<ab/>]!,") | {EOS}
    num_ended = 0
    async with serving(RandomRunner(VOCAB_SIZE, liked), max_steps_in_flight=2) as harness:
        for i in range(8):
            given = await answer(harness, structural(tree), f"r{i}")
            if given.finish_reason is FinishReason.STOP:
                num_ended += 1
                assert re.fullmatch(pattern, given.text, re.DOTALL), given.text
    assert num_ended > 4


async def test_what_stands_in_a_tag_is_tried_before_it_is_taken():
    """A walk through free text would never have met it."""
    grammars = patient_grammars(ByteTokenizer())
    hostile = {"type": "integer", "multipleOf": 99_999_989}
    for schema, message in ((hostile, "too complex"), ({"type": "nonsense"}, "nonsense")):
        tree = triggered(["<"], [tag("<a>", {"type": "json_schema", "json_schema": schema}, ">")])
        with pytest.raises(InvalidParameterError, match=message):
            await grammars.compile(structural(tree))
    grammars.close()


@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "mistral"])
async def test_as_many_tools_as_a_request_may_have(parser):
    grammars = patient_grammars(ByteTokenizer())
    properties = {f"p{i}": {"type": "string", "maxLength": 9 + i} for i in range(4)}
    tools = [
        {
            "name": f"f{i}",
            "arguments": {"type": "object", "properties": {**properties, f"q{i}": {}}},
        }
        for i in range(128)
    ]
    task = {"parser": parser, "answer": None, "tools": tools}
    await grammars.compile(
        StructuredOutput(kind=GrammarKind.TOOL_CALLS, text=json.dumps(task), param="tools")
    )
    grammars.close()


async def test_a_marker_may_be_a_special_token():
    tokenizer = ByteTokenizer(("<s>", "</s>", "[TOOL_CALLS]", "[ARGS]"))
    grammars = patient_grammars(tokenizer)
    task = {"parser": "mistral", "answer": None}
    task["tools"] = [{"name": "f", "arguments": {"type": "object", "maxProperties": 0}}]
    output = StructuredOutput(kind=GrammarKind.TOOL_CALLS, text=json.dumps(task))
    await grammars.compile(output)
    for ids in (
        [*b"Hi ", 258, ord("f"), 259, *b"{}", EOS],
        [258, *b'[{"name": "f", "arguments": {}}]', EOS],
        [*b"[TOOL_CALLS]f{}", EOS],
    ):
        matcher = grammars.matcher(output)
        assert matcher.validate_tokens(ids) == len(ids)
    assert grammars.matcher(output).validate_tokens([258, ord("g")]) == 1
    grammars.close()


async def test_commands_marks_are_special_tokens():
    """A text in them stays possible: what may not begin one would call instead."""
    marks = [*("<|START_ACTION|>", "<|END_ACTION|>"), *("<|START_RESPONSE|>", "<|END_RESPONSE|>")]
    tokenizer = ByteTokenizer(("<s>", "</s>", *marks))
    grammars = patient_grammars(tokenizer)
    tools = [{"name": "f", "arguments": {"type": "object", "maxProperties": 0}}]
    task = {"parser": "cohere", "answer": None, "tools": tools}
    output = StructuredOutput(kind=GrammarKind.TOOL_CALLS, text=json.dumps(task))
    await grammars.compile(output)
    call = '{"tool_call_id": "0", "tool_name": "f", "parameters": {}}'
    for says in (
        f"<|START_ACTION|>[\n    {call},\n    {call}\n]<|END_ACTION|>",
        "<|START_RESPONSE|>Hi<|END_RESPONSE|>",
        "Hi",
    ):
        ids = [*tokenizer.encode(says, add_special_tokens=False), EOS]
        assert grammars.matcher(output).validate_tokens(ids) == len(ids)
    bad = tokenizer.encode('<|START_ACTION|>[{"tool_name"', add_special_tokens=False)
    assert grammars.matcher(output).validate_tokens(bad) < len(bad)
    grammars.close()


async def test_harmonys_marks_are_special_tokens():
    """Thoughts and words may come first; what must be a call cannot be a last word."""
    tokenizer = ByteTokenizer(("<s>", "</s>", *MARKERS))
    ends = [
        tokenizer.encode(end, add_special_tokens=False)[0] for end in ("<|call|>", "<|return|>")
    ]
    grammars = patient_grammars(tokenizer, {EOS, *ends})
    task = {"parser": "openai", "answer": None}
    task["tools"] = [{"name": "f", "arguments": {"type": "object", "maxProperties": 0}}]
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    for is_forced in (True, False):
        text = json.dumps({**task, "is_forced": is_forced})
        output = StructuredOutput(kind=GrammarKind.TOOL_CALLS, text=text)
        await grammars.compile(output)

        def follows(says, output=output):
            ids = tokenizer.encode(says, add_special_tokens=False)
            return grammars.matcher(output).validate_tokens(ids) == len(ids)

        assert follows(call)
        assert follows(thought + thought.replace("analysis", "commentary") + call)
        assert not follows(thought + call.replace("functions.f", "functions.g"))
        assert follows(thought + "<|channel|>final<|message|>Hi<|return|>") is not is_forced
        assert not follows("Hi")
    grammars.close()
