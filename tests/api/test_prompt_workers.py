"""Long bodies are read in a worker process, with the same result as here."""

import orjson
import pytest

from streamserve.api.prompt_workers import LONG_BODY, PromptWorkers
from streamserve.engine.text_source import byte_text
from streamserve.engine.worker_pool import WorkerPool, WorkerTimeoutError
from streamserve.errors import InvalidParameterError
from tests.api.harness import HI, Api, chat_body, message_body

PADDING = "x" * LONG_BODY


def both():
    return Api(), Api(load_text=byte_text)


class CountingPool(WorkerPool):
    """Counts the bodies that it gets."""

    num_calls = 0

    async def call(self, payload, *, timeout_s, owner=""):
        self.num_calls += 1
        return await super().call(payload, timeout_s=timeout_s, owner=owner)


async def answers(*requests):
    """The answers of a server that reads all itself, and of one that has workers."""
    found = []
    for api in both():
        said = []
        workers = api.app.context.prompt_workers
        if workers is not None:
            workers._pool = CountingPool(workers._pool._factory)
        async with api.running():
            for path, body in requests:
                answer = await api.call("POST", path, body)
                content = answer.json
                content.pop("id", None)
                content.pop("request_id", None)
                said.append((answer.status, answer.headers.get("x-ignored-fields"), content))
            if workers is not None:
                assert workers._pool.num_calls == len(requests)
                assert len(workers.pids) == 1
                workers.close()
        found.append(said)
    return found


LONG = [
    ("/v1/chat/completions", chat_body(max_tokens=3, metadata=PADDING)),
    ("/v1/chat/completions", chat_body(max_tokens=3, metadata=PADDING, frobnicate=1, n=1)),
    ("/v1/chat/completions", chat_body(max_tokens=3, metadata=PADDING, model="nobody")),
    ("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": PADDING}])),
    ("/v1/chat/completions", chat_body(messages=[{"role": "tool", "content": PADDING}])),
    ("/v1/chat/completions", chat_body(metadata=PADDING, temperature=7)),
    ("/v1/chat/completions", chat_body(metadata=PADDING, logit_bias={"65": -100}, stop=["c"])),
    ("/v1/chat/completions", b'{"metadata": "' + PADDING.encode()),
    ("/v1/chat/completions", b'["' + PADDING.encode() + b'"]'),
    ("/v1/completions", {"prompt": ["Hi", "there"], "echo": True, "metadata": PADDING}),
    ("/v1/completions", {"prompt": [[65, 66], [67]], "echo": True, "metadata": PADDING}),
    ("/v1/completions", {"prompt": [65, 400], "metadata": PADDING}),
    ("/v1/completions", {"prompt": PADDING}),
    ("/v1/completions", {"prompt": PADDING, "truncate_prompt_tokens": 5, "max_tokens": 3}),
    ("/tokenize", {"prompt": PADDING, "return_token_strs": True, "frobnicate": 1}),
    ("/tokenize", {"messages": [{"role": "user", "content": PADDING}], "model": "alias"}),
    ("/tokenize", {"prompt": PADDING, "messages": []}),
    ("/tokenize", {"prompt": PADDING, "model": "nobody"}),
    ("/detokenize", {"tokens": [*b"Hi"] * LONG_BODY}),
    ("/detokenize", {"tokens": PADDING}),
    ("/v1/messages", message_body(max_tokens=3, stop_sequences=["c"], x=PADDING)),
    ("/v1/messages", message_body(system=PADDING)),
    ("/v1/messages/count_tokens", {"messages": [HI], "system": PADDING, "x": 1}),
    ("/v1/embeddings", {"input": ["Hi", "there"], "metadata": PADDING, "normalize": False}),
    ("/v1/embeddings", {"input": [[65], [66, 400]], "metadata": PADDING}),
    ("/v1/embeddings", {"input": PADDING, "truncate_prompt_tokens": -1}),
]


async def test_a_worker_answers_as_the_server_itself():
    here, there = await answers(*LONG)
    assert here == there


class Late:
    """A pool in whose turn nobody's work ends in time."""

    def __init__(self):
        self.owners = []

    async def call(self, payload, *, timeout_s, owner=""):
        self.owners.append(owner)
        raise WorkerTimeoutError


async def test_tenants_have_turns_and_what_takes_too_long_is_refused_by_its_field():
    workers = PromptWorkers(byte_text, {}, None, 64)
    workers._pool = Late()
    for work, param in (
        (workers.read("chat", b"{}", "alice"), "messages"),
        (workers.tokenize(b"{}", "bob"), "prompt"),
        (workers.detokenize(b"{}", "carol"), "tokens"),
    ):
        with pytest.raises(InvalidParameterError, match=f"{param} took longer than") as refused:
            await work
        assert refused.value.param == param
    assert workers._pool.owners == ["alice", "bob", "carol"]


async def test_template_arguments_of_a_client_go_to_a_worker():
    body = chat_body(max_tokens=3, chat_template_kwargs={"enable_thinking": True})
    tokenized = {name: body[name] for name in ("messages", "chat_template_kwargs")}
    here, there = await answers(("/v1/chat/completions", body), ("/tokenize", tokenized))
    assert here == there
    assert [status for status, *_ in here] == [200, 200]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat_body(max_tokens=3)),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}),
        ("/v1/messages", message_body(max_tokens=3)),
        ("/v1/messages/count_tokens", {"messages": [HI]}),
        ("/tokenize", {"messages": [HI]}),
    ],
)
async def test_after_a_runaway_template_every_chat_goes_to_a_worker(path, body):
    api = Api(load_text=byte_text)
    async with api.running():
        api.app.context.preprocessor.has_run_away = True
        answer = await api.call("POST", path, body)
        assert answer.status == 200
        assert len(api.app.context.prompt_workers.pids) == 1
        api.app.context.prompt_workers.close()


async def test_short_bodies_start_no_process():
    api = Api(load_text=byte_text)
    async with api.running():
        assert (await api.chat(max_tokens=2)).status == 200
        assert (await api.complete(max_tokens=2)).status == 200
    assert api.app.context.prompt_workers.pids == []


async def test_a_server_starts_a_worker_and_takes_it_along():
    api = Api(load_text=byte_text)
    async with api.serving():
        workers = api.app.context.prompt_workers
        exchange = await api.call("POST", *LONG[0])
        assert exchange.status == 200
        assert len(workers.pids) == 1
    assert workers.pids == []
    assert orjson.loads(exchange.body)["usage"]["prompt_tokens"] > 0
