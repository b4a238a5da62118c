"""`streamserve chat`: what is typed, what is shown, and how an answer is left."""

import asyncio
import io
from types import SimpleNamespace

import httpx
import pytest

from streamserve.cli import terminal
from streamserve.cli.chat import Conversation, HttpBackend, chat_loop
from streamserve.cli.local_chat import LocalBackend
from streamserve.cli.terminal import Piece, Screen, read_line, read_message
from streamserve.errors import StreamServeError
from tests.api.harness import MODEL, Api
from tests.api.scripted import TEMPLATE, scripted_parts

THOUGHT = "<think>\nHm, 1 < 2.\n</think>\n\nYes."
HI = [{"role": "user", "content": "Hi"}]


def typing(*lines):
    """Reads these lines, where one may be an exception, and then the end."""
    left = list(lines)

    def read(prompt):
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def shown(*pieces, is_watched=True, has_colours=True):
    stream = io.StringIO()
    screen = Screen(stream, is_watched=is_watched, has_colours=has_colours)
    for piece in pieces:
        screen.show(piece)
    screen.end()
    return stream.getvalue()


async def test_a_url_may_lack_its_scheme_or_have_the_apis_path():
    async with Api().serving() as (host, port):
        for url in (f"{host}:{port}", f"http://{host}:{port}/v1/", f"{host}:{port}/v1"):
            backend = await HttpBackend.connect(url, api_key=None, model=None, options={})
            assert backend.name == MODEL
            await backend.close()


def test_thoughts_are_dimmed_and_apart():
    pieces = [Piece("Hm", True), Piece(".", True), Piece("Yes"), Piece(".")]
    assert shown(*pieces) == "\x1b[2mHm.\x1b[0m\n\nYes.\n"
    assert shown(*pieces, has_colours=False) == "Hm.\n\nYes.\n"
    assert shown(*pieces, is_watched=False, has_colours=False) == "Yes.\n"
    assert shown(*pieces[:2]) == "\x1b[2mHm.\x1b[0m\n"  # what was stopped leaves nothing dimmed


async def said(backend, messages=HI):
    pieces = [piece async for piece in backend.answer(messages)]
    return ["".join(p.text for p in pieces if p.is_thought is kind) for kind in (True, False)]


async def test_thoughts_are_those_that_the_server_sees():
    async with Api(**scripted_parts(THOUGHT)).running() as api:
        transport = httpx.ASGITransport(app=api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert await said(HttpBackend(client, "alias", {})) == ["Hm, 1 < 2.", "Yes."]


async def test_an_engine_of_its_own_is_read_as_a_servers():
    parts = scripted_parts(THOUGHT)
    async with Api(**parts).running() as api:
        service = SimpleNamespace(
            engine=api.engine,
            tokenizer=api.tokenizer,
            chat_template=parts["template"],
            model_name="test",
            sampling_defaults={},
        )
        backend = LocalBackend(service, {"max_tokens": 100})
        assert await said(backend) == ["Hm, 1 < 2.", "Yes."]
        backend = LocalBackend(service, {"max_tokens": 12})
        assert await said(backend) == ["Hm,", ""]
    assert "enable_thinking" in TEMPLATE


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["  Hi "], "Hi"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one"),
        (['"""', "one", "", 'two"""  '], "one\n\ntwo"),
        (['  """one"""'], "one"),
        (['"""one'], "one"),
        (["one\ntwo"], "one\ntwo"),
    ],
)
def test_a_message_may_have_several_lines(lines, message):
    assert read_message(typing(*lines), "> ") == message


def test_without_any_input_it_is_at_its_end(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert not terminal.is_typed()
    with pytest.raises(EOFError):
        read_line("> ")


class Backend:
    """Answers what was asked, in capitals; a question may be to fail."""

    name = "test"

    def __init__(self):
        self.asked = []

    async def answer(self, messages):
        self.asked.append([message["content"] for message in messages])
        question = messages[-1]["content"]
        yield Piece("hm", True)
        if question != "think for ever":
            yield Piece(question.upper())
        if question in ("stop", "think for ever"):
            raise KeyboardInterrupt
        if question == "fail":
            raise StreamServeError("it broke")

    async def close(self):
        pass


def chatted(*lines, system=None, is_typed=True, monkeypatch=None):
    backend, conversation, stream = Backend(), Conversation(system), io.StringIO()
    screen = Screen(stream, is_watched=False, has_colours=False)
    if monkeypatch is not None:
        monkeypatch.setattr("streamserve.cli.chat.is_typed", lambda: is_typed)
    with asyncio.Runner() as runner:
        chat_loop(runner, backend, conversation, screen, typing(*lines))
    return backend.asked, stream.getvalue()


def test_ctrl_c_stops_the_answer_and_nothing_else():
    asked, text = chatted("stop", "more", "think for ever", "last")
    assert asked == [
        ["stop"],
        ["stop", "STOP", "more"],
        ["stop", "STOP", "more", "MORE", "think for ever"],
        ["stop", "STOP", "more", "MORE", "last"],
    ]
    assert text == "STOP [stopped]\nMORE\n [stopped]\nLAST\n"


def test_an_answer_that_failed_is_forgotten(capsys):
    asked, _ = chatted("fail", "again")
    assert asked == [["fail"], ["again"]]
    assert capsys.readouterr().err == "[it broke]\n"


def test_ctrl_c_where_nothing_runs_leaves_when_it_is_meant(monkeypatch, capsys):
    once = [KeyboardInterrupt(), "one", KeyboardInterrupt(), KeyboardInterrupt(), "two"]
    assert chatted(*once, monkeypatch=monkeypatch)[0] == [["one"]]
    assert capsys.readouterr().out.count("leaves") == 2
    piped = chatted(KeyboardInterrupt(), "one", is_typed=False, monkeypatch=monkeypatch)
    assert piped[0] == []


def test_commands(capsys):
    lines = ["/system", "one", "/reset", "two", "/system  Be brief. ", "/system", "three", "/what"]
    asked, _ = chatted(*lines, "/help", "/exit", "never")
    assert asked == [["one"], ["two"], ["Be brief.", "three"]]
    out = capsys.readouterr().out
    assert out.count("Be brief.") == 1
    assert "there is no system prompt" in out
    assert "there is no /what" in out
    assert out.count("/reset        forget") == 2
