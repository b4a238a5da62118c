"""A model on two ranks, two processes, as a user meets it; and whatever may befall one."""

import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch

from streamserve import LLM, AsyncLLM
from streamserve.cli.ranks import LeadingTeam
from streamserve.core.plan import SchedulerOutput
from streamserve.engine.child import start_child
from streamserve.errors import EngineDeadError, ModelLoadError
from streamserve.runner.model_runner import Launched, TorchModelRunner
from tests.e2e.servers import SMALL, SMALL_FLAGS, Server, running_server

IN_PROCESS = {"tensor_parallel_size": 2, "device": "cpu", **SMALL}
FLAGS = ("--tensor-parallel-size", "2", "--device", "cpu", *SMALL_FLAGS)
STORY = [{"role": "user", "content": "Tell me a story."}]
LONG = {"model": "box", "prompt": "Once", "max_tokens": 1900, "extra_body": {"ignore_eos": True}}


def others(server: Server | None = None) -> list[psutil.Process]:
    """The processes of the other ranks: a server's, or this process's own."""
    children = psutil.Process(None if server is None else server.process.pid).children()
    return [child for child in children if "rank_main" in " ".join(child.cmdline())]


def assert_gone(processes: list[psutil.Process]) -> None:
    assert not psutil.wait_procs(processes, timeout=60)[1]


def answers(server: Server) -> list:
    with server.client() as client:
        chat = client.chat.completions.create(
            model="box", messages=STORY, temperature=0, max_tokens=48, logprobs=True
        )
        drawn = client.completions.create(
            model="box", prompt="Once upon", seed=5, max_tokens=24, temperature=1.0
        )
        chosen = client.chat.completions.create(
            model="box",
            messages=STORY,
            seed=3,
            extra_body={"structured_outputs": {"choice": ["yellow", "green", "blue"]}},
        )
        echoed = client.completions.create(
            model="box", prompt="What is this?", max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        vector = client.embeddings.create(model="box", input="a b c").data[0].embedding
    logprobs = [entry.logprob for entry in chat.choices[0].logprobs.content]
    logprobs += echoed.choices[0].logprobs.token_logprobs[1:]
    texts = [chat.choices[0].message.content, drawn.choices[0].text, echoed.choices[0].text]
    return [texts, chosen.choices[0].message.content, logprobs, vector]


def test_two_ranks_answer_as_one_and_end_behind_their_streams(box: Server) -> None:
    with running_server(*FLAGS) as server:
        ranks = others(server)
        assert len(ranks) == 1
        texts, chosen, *numbers = answers(server)
        expected_texts, expected_choice, *expected_numbers = answers(box)
        assert (texts, chosen) == (expected_texts, expected_choice)
        for found, expected in zip(numbers, expected_numbers, strict=True):
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-3
            )
        with server.client() as client:
            stream = client.completions.create(stream=True, **{**LONG, "max_tokens": 50})
            next(iter(stream))
            ranks[0].send_signal(signal.SIGTERM)  # as a service manager ends a whole group
            server.process.send_signal(signal.SIGTERM)
            *_, last = stream
            assert last.choices[0].finish_reason == "length"
        assert server.process.wait(60) == 0
        assert_gone(ranks)


def test_a_rank_that_is_killed_is_the_end_of_every_stream_and_of_the_server() -> None:
    with running_server(*FLAGS) as server:
        ranks = others(server)
        with server.client() as client:
            streams = [client.completions.create(stream=True, **LONG) for _ in range(2)]
            for stream in streams:
                next(iter(stream))
            ranks[0].kill()
            for stream in streams:
                with pytest.raises(openai.APIError, match="engine is dead"):
                    list(stream)
        assert server.process.wait(60) == 1
        assert_gone(ranks)
    assert "rank 1 (process" in server.output


def test_a_rank_that_is_killed_while_nobody_asks_is_the_end_of_the_server() -> None:
    with running_server(*FLAGS, "--drain-timeout", "2") as server:
        ranks = others(server)
        with server.client() as client:
            # Whoever asked may come back for the rest: so long the server can be looked at.
            stream = client.completions.create(
                stream=True, extra_headers={"X-Stream-Resume": "1"}, **{**LONG, "max_tokens": 9}
            )
            next(iter(stream))
            stream.close()
        while server.metrics()["streamserve:num_requests_running"]:
            time.sleep(0.01)
        ranks[0].kill()
        with httpx.Client(base_url=server.url) as balancer:
            for _ in range(500):
                if (health := balancer.get("/health")).status_code != 200:
                    break
                time.sleep(0.01)
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        assert server.process.wait(60) == 1
        assert_gone(ranks)
    assert "rank 1 (process" in server.output


@pytest.fixture
def num_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("streamserve-")]


def test_in_process_a_killed_rank_is_an_error_and_nothing_is_left(num_threads: int) -> None:
    before = our_threads()
    with LLM(**IN_PROCESS) as llm:
        assert torch.get_num_threads() == num_threads, "of the program's own work"
        assert asked_on_new_thread(torch.get_num_threads) == num_threads
        own = llm._service.engine._runner._own
        model, in_steps = weakref.ref(own._model), counted_in_steps(own)
        llm.generate("Hello", use_tqdm=False)
        assert set(in_steps) == {num_threads // 2}
        [rank] = others()
        rank.kill()
        llm._loop.run(llm._service.engine.wait_dead())
        with pytest.raises(EngineDeadError, match="no step can run any more: DeviceDeadError"):
            llm.generate("Hello", use_tqdm=False)
    assert_gone([rank])
    assert model() is None
    assert (our_threads(), others()) == (before, [])
    assert torch.get_num_threads() == num_threads


async def test_in_process_a_rank_may_be_killed_before_anybody_asks() -> None:
    before = our_threads()
    llm = AsyncLLM(**IN_PROCESS)
    [rank] = others()
    rank.kill()
    assert_gone([rank])
    with pytest.raises(EngineDeadError, match="no step can run any more: DeviceDeadError"):
        await anext(llm.generate("Hello"))
    await llm.close()
    assert (our_threads(), others()) == (before, [])


def counted_in_steps(runner: TorchModelRunner) -> list[int]:
    """The number of threads that each later step computes with."""
    forward, found = runner._forward, []

    def counting(plan: SchedulerOutput) -> Launched:
        found.append(torch.get_num_threads())
        return forward(plan)

    runner._forward = counting
    return found


def asked_on_new_thread(ask: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(ask).result()


def test_what_a_rank_says_that_cannot_start_is_the_error(tmp_path: Path) -> None:
    from streamserve.cli.args import parse_args

    args = parse_args(["serve", *FLAGS])
    before = psutil.Process().children()
    with pytest.raises(ModelLoadError, match=str(tmp_path)):
        LeadingTeam(args, tmp_path, torch.device("cpu"))
    assert psutil.Process().children() == before


def test_a_rank_ends_when_the_first_one_is_gone() -> None:
    process, sock = start_child("streamserve.cli.rank_main")
    sock.close()
    assert process.wait(120) == 1
