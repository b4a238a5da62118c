"""Templates and other work that does not end by itself."""

import asyncio
import threading

import jinja2
import pytest

from streamserve.engine.builtin_templates import TEMPLATES
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.tame_templates import is_tame
from streamserve.errors import InvalidParameterError
from tests.engine.fakes import LONG

SPINS = (
    "{% if messages[0].content == 'spin' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}ok"
)


def chat(text):
    return [{"role": "user", "content": text}]


async def test_a_template_that_spins_is_stopped_and_delays_nobody():
    preprocessor = Preprocessor(ByteTokenizer(), ChatTemplate(SPINS, source="x"), timeout_s=LONG)
    assert (await preprocessor.chat(chat("walk"))).text == "ok"
    before = threading.active_count()
    preprocessor._timeout_s = 0.05
    with pytest.raises(InvalidParameterError, match=r"messages took longer than .* 0\.05 s"):
        await preprocessor.chat(chat("spin"))
    preprocessor._timeout_s = LONG
    assert preprocessor.has_run_away
    async with asyncio.timeout(60):
        while threading.active_count() >= before:  # its thread has ended, not only been forgotten
            await asyncio.sleep(0.01)
    assert (await preprocessor.chat(chat("walk"))).text == "ok"
    preprocessor.close()


async def test_a_template_of_the_request_that_spins_is_stopped():
    trusting = ChatTemplate("{{ messages[0].content }}", source="x", trusts_requests=True)
    preprocessor = Preprocessor(ByteTokenizer(), trusting, timeout_s=0.05)
    with pytest.raises(InvalidParameterError, match="took longer"):
        await preprocessor.chat(chat("spin"), chat_template=SPINS)
    preprocessor._timeout_s = LONG
    assert (await preprocessor.chat(chat("walk"))).text == "walk"
    preprocessor.close()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", True),
        ("{% for i in range(9) %}{{ i }}{% endfor %}", False),
        ("{{ 'x' * 9 }}", False),
        ("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", False),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}", False),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}", True),
        ("{% for a in m %}" * 4 + "{% endfor %}" * 4, False),
        *((text, True) for text in TEMPLATES.values()),
    ],
)
def test_templates_that_cannot_spin_are_known(template, expected):
    assert is_tame(jinja2.Environment().parse(template)) is expected
