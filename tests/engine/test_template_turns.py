"""What a chat template would refuse, or leave out, is said in turns that it shows."""

import pytest

from streamserve.engine import template_turns
from streamserve.engine.chat_template import ChatTemplate
from streamserve.errors import InvalidParameterError

# Each in the way of published ones, without what is of no interest here.
ANYTHING = """\
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}({{ call.id }} {{ call.function.arguments.word }}){% endfor %}|
{%- endfor %}"""
FIRST_ONLY = """\
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('must be at the beginning') }}
{%- endif %}{{ m.role }}: {{ m.content }}|{% endfor %}"""  # Qwen 3.5
OTHERS_LOST = """\
{%- if messages[0].role == 'system' %}system: {{ messages[0].content }}|
{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}
{%- if m.tool_calls %}({{ m.tool_calls[0].id }} {{ m.tool_calls[0].function.arguments.word }})
{%- endif %}|{% endfor %}"""  # gpt-oss
LAST_WINS = """\
{%- set ns = namespace(system='') %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor -%}
system: {{ ns.system }}|
{%- for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}|
{%- endfor %}"""  # DeepSeek R1
NO_SYSTEM = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}
{%- endif %}{{ m.role }}: {{ m.content }}|{% endfor %}"""  # Gemma 2
ALTERNATING = """\
{%- set ns = namespace(index=0) %}
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('only the first') }}{% endif %}
{%- if m.role in ('user', 'assistant') and not m.tool_calls %}
{%- if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('must alternate') }}
{%- endif %}{%- set ns.index = ns.index + 1 %}{% endif %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
({{ call.id }} {{ call.function.arguments.word }}){% endfor %}|
{%- endfor %}"""  # Mistral
ONE_CALL = """\
{%- for m in messages %}
{%- if m.tool_calls and m.tool_calls | length != 1 %}{{ raise_exception('only single calls') }}
{%- endif %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}({{ call.id }} {{ call.function.arguments.word }}){% endfor %}|
{%- endfor %}"""  # Llama 3.1


WORDS_ONLY = """\
{%- for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}|
{%- endfor %}"""  # knows no tools


def said(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(word):
    function = {"name": "look_up", "arguments": {"word": word}}
    return {"id": word * 9, "type": "function", "function": function}


def result(word):
    return said("tool", f"of {word}", tool_call_id=word * 9)


def rendered(template, messages, **options):
    return ChatTemplate(template, source="the test").render(messages, **options)


SYSTEMS = [said("system", "S1"), said("system", "S2"), said("user", "U1")]
LATER = [said("system", "S1"), said("user", "U1"), said("system", "S2"), said("user", "U2")]
TURNS = [said("user", "U1"), said("user", "U2"), said("assistant", "A1"), said("assistant", "A2")]
CALLED_LATER = [
    *TURNS[1:3],
    said("assistant", "A2", tool_calls=[{"id": "x" * 9, "function": {"arguments": {"word": "x"}}}]),
]
CALLS = [
    said("user", "U1"),
    said("assistant", "A1", tool_calls=[call("x"), call("y")], reasoning_content="T1"),
    result("y"),
    result("x"),
    result("z"),
    said("user", "U2"),
]
AS_THEY_ARE = "assistant: A1(xxxxxxxxx x)(yyyyyyyyy y)|tool: of y|tool: of x|tool: of z|user: U2|"


@pytest.mark.parametrize(
    ("template", "chat", "prompt"),
    [
        (ANYTHING, SYSTEMS, "system: S1|system: S2|user: U1|"),
        (ANYTHING, LATER, "system: S1|user: U1|system: S2|user: U2|"),
        (ANYTHING, TURNS, "user: U1|user: U2|assistant: A1|assistant: A2|"),
        (ANYTHING, CALLS, f"user: U1|{AS_THEY_ARE}"),
        (WORDS_ONLY, CALLS, "user: U1|assistant: A1|user: U2|"),
        (FIRST_ONLY, SYSTEMS, "system: S1\n\nS2|user: U1|"),
        (FIRST_ONLY, LATER, "system: S1|user: U1|user: S2|user: U2|"),
        (OTHERS_LOST, SYSTEMS, "system: S1\n\nS2|user: U1|"),
        (OTHERS_LOST, LATER, "system: S1|user: U1|user: S2|user: U2|"),
        (LAST_WINS, SYSTEMS, "system: S1\n\nS2|user: U1|"),
        (LAST_WINS, LATER, "system: S1|user: U1|user: S2|user: U2|"),
        (NO_SYSTEM, SYSTEMS, "user: S1\n\nS2\n\nU1|"),
        (NO_SYSTEM, LATER, "user: S1\n\nU1\n\nS2\n\nU2|"),
        (NO_SYSTEM, TURNS, "user: U1\n\nU2|assistant: A1\n\nA2|"),
        (ALTERNATING, SYSTEMS, "system: S1\n\nS2|user: U1|"),
        (ALTERNATING, CALLED_LATER, "user: U2|assistant: A1|assistant: A2(xxxxxxxxx x)|"),
        (ALTERNATING, LATER, "system: S1|user: U1\n\nS2\n\nU2|"),
        (
            ALTERNATING,
            CALLS,
            f"user: U1|{AS_THEY_ARE.replace('user: U2', 'assistant: Done.|user: U2')}",
        ),
    ],
)
def test_systems_and_turns_reach_every_template(template, chat, prompt):
    assert rendered(template, chat) == prompt


@pytest.mark.parametrize("template", [ONE_CALL, OTHERS_LOST])
def test_calls_become_messages_of_their_own_with_their_results(template):
    assert rendered(template, CALLS) == (
        "user: U1|assistant: A1(xxxxxxxxx x)|tool: of x|assistant: (yyyyyyyyy y)|tool: of y|"
        "tool: of z|user: U2|"
    )


def test_calls_are_tried_with_tools():
    template = ONE_CALL.replace(
        "m.tool_calls | length != 1 %}", "(m.tool_calls | length != 1 or not tools) %}"
    )
    assert "|assistant: (yyyyyyyyy y)|" in rendered(template, CALLS, tools=[{"type": "function"}])


def test_what_was_thought_stands_before_the_first_call_only():
    template = ONE_CALL.replace("{{ m.role }}", "{{ m.role }}<{{ m.reasoning_content }}>")
    prompt = rendered(template, CALLS)
    assert "assistant<T1>: A1(x" in prompt
    assert "assistant<>: (y" in prompt


def test_a_turn_of_several_keeps_what_was_thought():
    template = ALTERNATING.replace("{{ m.role }}", "{{ m.role }}<{{ m.reasoning_content }}>")
    chat = [*TURNS[:1], TURNS[2], said("assistant", "A2", reasoning_content="T2")]
    assert rendered(template, chat) == "user<>: U1|assistant<T2>: A1\n\nA2|"


def test_what_no_turn_can_mend_is_refused():
    with pytest.raises(InvalidParameterError, match="must alternate"):
        rendered(NO_SYSTEM, TURNS[2:])


def test_the_last_turn_is_continued_whole():
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert rendered(NO_SYSTEM, TURNS, **options) == "user: U1\n\nU2|assistant: A1\n\nA2"


def test_a_turn_of_many_messages_is_joined_at_once(monkeypatch):
    """Joined pair by pair, 4,000 messages of a thousand characters took seconds."""
    nums_joined = []
    joined = template_turns._joined

    def counting(messages):
        nums_joined.append(len(messages))
        return joined(messages)

    monkeypatch.setattr(template_turns, "_joined", counting)
    assert (
        rendered(NO_SYSTEM, [said("user", "U")] * 100) == "user: " + "\n\n".join(["U"] * 100) + "|"
    )
    assert nums_joined == [100]


def test_each_result_of_many_is_looked_at_once():
    class Result(dict):
        num_looked_up = 0

        def get(self, name, default=None):
            self.num_looked_up += name == "tool_call_id"
            return super().get(name, default)

    words = [f"w{n}" for n in range(20)]
    results = [Result(result(word)) for word in [*words, *words]]
    calls = said("assistant", "", tool_calls=[call(word) for word in words])
    prompt = rendered(ONE_CALL, [said("user", "U1"), calls, *results])
    assert prompt.count("tool: of w7|tool: of w7|") == 1
    assert {r.num_looked_up for r in results} == {1}


PARTS_ONLY = """\
{%- for m in messages %}{{ m.role }}:
{%- for part in m.content if part.type == 'text' %} {{ part.text }}{% endfor %}|
{%- endfor %}"""  # SmolVLM, LLaVA
RESULTS_BY_NAME = """\
{%- for m in messages %}{{ m.role }}:
{%- if m.role == 'tool' and m.content is not string %}
{%- for part in m.content %} {{ part }}{% endfor %}
{%- elif m.content is string %} {{ m.content }}
{%- else %}{% for part in m.content %} {{ part.text }}{% endfor %}{% endif %}
{%- for call in m.tool_calls or [] %} {{ call.function.arguments.word }}{% endfor %}|
{%- endfor %}"""  # GLM 4.6


def test_text_comes_as_parts_where_a_template_looks_for_parts():
    parts = [{"type": "text", "text": "A1"}, {"type": "text", "text": "A2"}]
    chat = [*SYSTEMS, said("assistant", parts), said("user", "U2")]
    assert rendered(PARTS_ONLY, chat) == "system: S1|system: S2|user: U1|assistant: A1 A2|user: U2|"
    opened = rendered(
        PARTS_ONLY, chat[:4], add_generation_prompt=False, continue_final_message=True
    )
    assert opened.endswith("assistant: A1 A2")


def test_parts_are_joined_for_the_roles_whose_parts_a_template_does_not_know():
    def parts(one, two):
        return [{"type": "text", "text": one}, {"type": "text", "text": two}]

    chat = [
        said("user", parts("U1", "U2")),
        said("assistant", "", tool_calls=[call("x")]),
        said("tool", parts("R1", "R2"), tool_call_id="x" * 9),
    ]
    assert rendered(RESULTS_BY_NAME, chat) == "user: U1 U2|assistant:  x|tool: R1\nR2|"


def test_turns_are_tried_in_parts_where_a_template_looks_for_parts():
    template = PARTS_ONLY.replace(
        "%}{{ m.role }}:",
        "%}{% if m.role == 'system' and not loop.first %}{{ raise_exception('') }}{% endif %}"
        "{{ m.role }}:",
    )
    assert rendered(template, LATER) == "system: S1|user: U1|user: S2|user: U2|"


TAKES_BOTH = """\
{%- for m in messages %}
{%- if m.role == 'tool' and not tools %}{{ raise_exception('there are no tools') }}{% endif %}
{%- if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}|
{%- endfor %}"""


def test_text_and_parts_stay_what_they_are_where_a_template_takes_both():
    parts = [{"type": "text", "text": "R1"}, {"type": "text", "text": "R2"}]
    chat = [said("user", "U1"), *CALLS[1:2], said("tool", parts, tool_call_id="x" * 9)]
    assert rendered(TAKES_BOTH, chat, tools=[{"type": "function"}]) == "U1|A1|[R1][R2]|"


def test_of_a_template_that_shows_nothing_nothing_is_known():
    assert rendered("{{ messages | length }}", [*LATER, *TURNS]) == "8"


def test_the_template_for_tools_has_turns_of_its_own():
    template = ChatTemplate({"default": FIRST_ONLY, "tool_use": ANYTHING}, source="the test")
    assert "user: S2" in template.render(LATER)
    assert "system: S2" in template.render(LATER, tools=[{"type": "function"}])
