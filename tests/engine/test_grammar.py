"""Grammars are compiled once, off the loop, and a hostile one harms nobody."""

import asyncio
import json
import os
import signal

import pytest

from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.grammar import MAX_GRAMMAR_CHARACTERS
from streamserve.engine.grammar_source import JSON_WHITESPACE, llguidance_grammar
from streamserve.engine.grammar_trial import GrammarTrial, Task
from streamserve.errors import EngineDeadError, InvalidParameterError, QueueFullError
from tests.engine.fakes import EOS, LONG, patient_grammars


def grammar(kind: str, text: str, **options) -> StructuredOutput:
    return StructuredOutput(kind=GrammarKind(kind), text=text, **options)


def schema(**value) -> StructuredOutput:
    return grammar("json_schema", json.dumps(value))


@pytest.fixture
def grammars():
    grammars = patient_grammars(ByteTokenizer())
    yield grammars
    grammars.close()


NOT_GRAMMARS = [
    (schema(type="strin"), "strin"),
    (schema(type="array", uniqueItems=True), "uniqueItems"),
    (schema(type="integer", minimum=5, maximum=4), "nsatisfiable"),
    (schema(**{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "nothing matches"),
    (schema(**{"$ref": "https://example.com/schema.json"}), "example.com"),
    (grammar("json_schema", "{"), "Expecting property name"),
    (grammar("json_schema", "[]"), "must be an object or true"),
    (grammar("json_schema", "false"), "must be an object or true"),
    (grammar("regex", "(a"), "unclosed group"),
    (grammar("regex", "(?=a)b"), "look-around"),
    (grammar("regex", r"(a)\1"), "backreference"),
    (grammar("lark", 'foo: "a"'), "Expected ::="),
    (grammar("lark", "start: unknown"), "unknown"),
    (grammar("lark", "start: start"), "nothing matches"),
    (grammar("lark", ""), "No 'root' rule"),
]


@pytest.mark.parametrize(("output", "message"), NOT_GRAMMARS)
async def test_what_is_no_grammar_is_refused_by_its_field(grammars, output, message):
    with pytest.raises(InvalidParameterError, match=message) as refused:
        await grammars.compile(output)
    assert refused.value.param == "structured_outputs"
    assert len(refused.value.message) < 600


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


HOSTILE = [
    grammar("json_schema", nested(1000)),
    schema(type="integer", multipleOf=99_999_989),
    schema(type="object", properties={f"p{i}": {} for i in range(8000)}),
    schema(enum=[f"value {i} of very many" for i in range(10_000)]),
    schema(allOf=[{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(8)]),
    grammar("regex", "a" * (MAX_GRAMMAR_CHARACTERS + 1)),
    grammar("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
]


@pytest.mark.parametrize("output", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_hostile_grammar_is_refused_and_the_loop_goes_on(grammars, output):
    compiling = asyncio.create_task(grammars.compile(output))
    num_turns = 0
    while not compiling.done():
        await asyncio.sleep(0.001)  # without a pause the worker would have no core of its own
        num_turns += 1
    assert num_turns > 1 or len(output.text) > MAX_GRAMMAR_CHARACTERS
    with pytest.raises(InvalidParameterError, match="structured_outputs"):
        await compiling
    await grammars.compile(grammar("regex", "a"))
    # At once the second time: it is known.
    with pytest.raises(InvalidParameterError):
        await grammars.compile(output)


async def test_backtracking_is_no_danger_and_salts_take_turns(grammars):
    done = []

    async def compiled(pattern, salt):
        await grammars.compile(grammar("regex", pattern, salt=salt))
        done.append((pattern, salt))

    patterns = ("(a+)+$", "(a|a)*b", "(.*)*x", "(a{1,1000}){1,1000}")
    first, second, third, other = zip(patterns, "aaab", strict=True)
    await asyncio.gather(*(compiled(*each) for each in (first, second, third, other)))
    assert done == [first, second, other, third]


async def test_anything_is_a_grammar_too(grammars):
    for output in (grammar("json_schema", "true"), schema(), grammar("regex", "")):
        await grammars.compile(output)


async def test_equal_grammars_are_compiled_once(grammars):
    output = schema(type="object")
    other = grammar("json_schema", output.text, param="response_format")
    await asyncio.gather(*(grammars.compile(o) for o in (output, other, output)))
    assert grammars.num_cached == 1
    one, two = grammars.matcher(output), grammars.matcher(other)
    assert one.consume_token(ord("{"))
    assert two.consume_token(ord("{"))
    assert one.consume_token(ord("}"))
    assert one.is_accepting()
    assert not two.is_accepting()
    given_up, waits = (
        asyncio.create_task(grammars.compile(grammar("regex", "b"))) for _ in range(2)
    )
    await asyncio.sleep(0)
    given_up.cancel()
    await waits


async def test_an_error_names_the_field_of_who_asks(grammars):
    for param in ("guided_regex", "structured_outputs", "guided_regex"):
        with pytest.raises(InvalidParameterError, match=param) as refused:
            await grammars.compile(grammar("regex", "(", param=param))
        assert refused.value.param == param
    assert grammars.num_cached == 1


async def test_the_oldest_grammars_are_forgotten():
    grammars = patient_grammars(ByteTokenizer(), max_entries=3, max_characters=1000)
    outputs = [grammar("regex", f"a{{{i}}}") for i in range(1, 5)]
    for output in outputs:
        await grammars.compile(output)
    assert grammars.num_cached == 3
    grammars.matcher(outputs[-1])
    with pytest.raises(KeyError):
        grammars.matcher(outputs[0])
    await grammars.compile(grammar("regex", "b" * 999))
    assert grammars.num_cached == 1
    await grammars.compile(grammar("regex", "c"))
    assert grammars.num_cached == 2, "there is room for one character"
    grammars.close()


async def test_each_id_that_ends_an_answer_may_end_it():
    grammars = patient_grammars(ByteTokenizer(), {EOS - 1, EOS})
    output = grammar("regex", "a")
    await grammars.compile(output)
    matcher = grammars.matcher(output)
    assert matcher.consume_token(ord("a"))
    assert [i for i in range(258) if matcher.compute_bitmask()[i >> 3] >> (i & 7) & 1] == [256, 257]
    grammars.close()


async def test_special_tokens_are_known_by_name():
    grammars = patient_grammars(ByteTokenizer(("<s>", "</s>", "<tool_call>")))
    output = grammar("lark", 'start: <tool_call> %json {"const": 1}')
    await grammars.compile(output)
    matcher = grammars.matcher(output)
    assert matcher.consume_tokens([258, ord("1")])
    assert matcher.is_accepting()
    grammars.close()


async def test_a_machine_too_busy_for_a_grammar_refuses_for_now():
    """A worker that is given no processor time has not found the grammar too complex."""
    grammars = patient_grammars(ByteTokenizer(), new_trial=GrammarTrial)
    await grammars.compile(grammar("regex", "a"))
    worker = grammars._trial._process
    os.kill(worker.pid, signal.SIGSTOP)
    grammars._timeout_s = 0.0
    compiling = (grammars.compile(grammar("regex", pattern)) for pattern in "bc")
    slow, other = await asyncio.gather(*compiling, return_exceptions=True)
    assert isinstance(slow, QueueFullError)
    assert slow.message == "the machine is too busy to compile structured_outputs: the limit is 0 s"
    assert isinstance(other, QueueFullError)
    assert other.message.startswith("too many grammars are compiled before structured_outputs")
    assert grammars.num_cached == 1, "nothing is known of either"
    assert grammars._pool is None, "who comes next has a thread of its own"
    assert worker.returncode == -signal.SIGKILL
    grammars._timeout_s = LONG
    await grammars.compile(grammar("regex", "b"))
    grammars.close()
    with pytest.raises(EngineDeadError, match="shutting down"):
        await grammars.compile(grammar("regex", "c"))


def test_a_worker_that_dies_is_replaced():
    trial = GrammarTrial(cpu_limit_s=0.2, memory_limit=2**29)
    slow = Task("json_schema", '{"type": "integer", "multipleOf": 99999989}', None)
    assert trial(slow).error == "too complex: it takes longer than the limit of 0.2 s"
    assert trial(Task("regex", "a", None)).error == ""
    pid = trial._process.pid
    os.kill(pid, signal.SIGKILL)  # as the system does where memory is short
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert trial(Task("regex", "b", None)).error == ""
    trial.close()
    small = GrammarTrial(memory_limit=2**20)
    assert small(slow).error == "too complex: it needs more than the limit of 1 MiB"
    small.close()
    small.close()


@pytest.mark.parametrize("whitespace", [None, "", " ?"])
def test_white_space_in_calls_is_bounded_or_as_told(whitespace):
    tools = [{"name": name, "arguments": {"type": "object"}} for name in "fg"]
    task = json.dumps({"parser": "hermes", "answer": {"type": "object"}, "tools": tools})
    written, parts = llguidance_grammar(GrammarKind.TOOL_CALLS, task, whitespace)
    told = {None: JSON_WHITESPACE, "": False}.get(whitespace, whitespace)
    options = {"whitespace_flexible" if whitespace == "" else "whitespace_pattern": told}
    assert written.count('"required": ["name", "arguments"]') == len(tools)
    said = json.dumps({"x-guidance": options})[1:-1]
    for lark in (written, *parts):
        assert lark.count("%json ") == lark.count(said) > 0


def test_each_tool_adds_to_the_limit_of_time():
    schemas = [{"properties": {"p": {"type": "string", "maxLength": i}}} for i in range(1, 129)]
    tools = [{"name": f"f{i}", "arguments": schema} for i, schema in enumerate(schemas)]
    task = json.dumps({"parser": "hermes", "answer": None, "tools": tools})
    trial = GrammarTrial(cpu_limit_s=0.1)
    assert trial(Task("tool_calls", task, None)).error == ""
    trial.close()
