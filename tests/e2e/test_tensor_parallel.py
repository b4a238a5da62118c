"""A model on two ranks, two processes, as a user meets it; and whatever may befall one."""

import signal
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch

from streamserve.cli.ranks import LeadingTeam
from streamserve.engine.child import start_child
from streamserve.errors import ModelLoadError
from tests.e2e.servers import Server, running_server

FLAGS = ("--tensor-parallel-size", "2", "--device", "cpu", "--dtype", "float32")
STORY = [{"role": "user", "content": "Tell me a story."}]
LONG = {"model": "box", "prompt": "Once", "max_tokens": 1900, "extra_body": {"ignore_eos": True}}


def others(server: Server) -> list[psutil.Process]:
    """The processes of the other ranks."""
    children = psutil.Process(server.process.pid).children()
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
            stream = client.completions.create(stream=True, **{**LONG, "max_tokens": 100})
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
    with running_server(*FLAGS, "--drain-timeout", "3") as server:
        ranks = others(server)
        with server.client() as client:
            # Whoever asked may come back for the rest: so long the server can be looked at.
            stream = client.completions.create(
                stream=True, extra_headers={"X-Stream-Resume": "1"}, **{**LONG, "max_tokens": 100}
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
