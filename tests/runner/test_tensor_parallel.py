"""The runners of several ranks, which are threads here, serve what one device's runner serves."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

import streamserve_kernels
from streamserve.core.death import Death
from streamserve.core.plan import NewRequest, ScheduledRequest, SchedulerOutput
from streamserve.core.pooling import Pooling
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import DeviceDeadError
from streamserve.models import load_model
from streamserve.runner.build import build_runner, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.tensor_parallel.follow import follow
from streamserve.runner.tensor_parallel.lead import STEP_LIMIT_S, LeadRunner
from streamserve.runner.tensor_parallel.team import agreed
from tests.models.checkpoints import random_checkpoint
from tests.models.native import GQA
from tests.models.thread_ranks import load_shares
from tests.runner.loop import BLOCK_SIZE, NUM_BLOCKS, Loop
from tests.runner.test_families import CHUNK, FEW_BLOCKS, Crowd, request_of
from tests.runner.test_speculation import lookup
from tests.runner.tiny_llama import CPU, memory_for

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **GQA}
OPTIONS = {
    "dtype": torch.float32,
    "device": CPU,
    "kernels": streamserve_kernels.load(CPU, "naive"),
}
NUM_DRAFTS = 3
MASKED = "masked"
# Of all ids that come after 2 the even ones.
MASK = bytes([0b01010101] * 13)


class Threads:
    """`Followers` of one, a thread."""

    def __init__(self) -> None:
        self.inbox: SimpleQueue = SimpleQueue()
        self.failure: DeviceDeadError | None = None
        self.messages = 0
        self.thread: threading.Thread | None = None
        self._tell: list[Callable] = []

    def send(self, message) -> None:
        self.messages += 1
        self.inbox.put(message)

    def on_failure(self, tell) -> None:
        self._tell.append(tell)

    def fail(self, error: DeviceDeadError) -> None:
        if self.failure is None:
            self.failure = error
            for tell in self._tell:
                tell(error)

    def close(self) -> None:
        self.inbox.put(None)
        if self.thread is not None:
            self.thread.join(120)


class ThreadTeam:
    def __init__(self, ranks, followers: Threads) -> None:
        self.ranks, self.followers = ranks, followers

    def least(self, number: int) -> int:
        return int(self.ranks.all_gather(torch.tensor([number])).min())

    def steer(self, own, commands: Mapping[str, Callable[[], None]]) -> LeadRunner:
        if self.ranks.rank == 0:
            return LeadRunner(own, self.followers, commands)
        follow(self.followers.inbox.get, own, commands, lambda error: None)
        raise SystemExit


def build(model, *, on_device: bool, team: ThreadTeam | None = None):
    memory = memory_for(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    caches = new_kv_cache(model.spec, memory, model.dtype, CPU, model.kernels)
    options = {"max_num_batched_tokens": CHUNK, "kv_caches": caches, "team": team}
    max_num_sampled = (1 + NUM_DRAFTS) * memory.max_num_seqs
    if on_device:
        drafting = {"num_drafts": NUM_DRAFTS, "max_num_sampled": max_num_sampled}
        ladder = StepLadder(CHUNK, memory.max_num_seqs, **drafting)
        return build_cuda_runner(model, memory, ladder, **options)[0]
    return build_runner(model, memory, max_num_sampled=max_num_sampled, **options)[0]


class Masked:
    """A runner whose requests of one name may draw some tokens only."""

    def __init__(self, runner) -> None:
        self.runner = runner
        self.launch = runner.launch

    def sample(self, step_id: int):
        return self.runner.sample(step_id, {MASKED: MASK})


def serve(runner) -> tuple[list, list, list]:
    """What a crowd is answered, then some who draw in other ways; and the logprobs of all."""
    crowd = Crowd(runner, [Pooling(kind=kind, normalize=False) for kind in ("last", "mean")])
    crowd.assert_that_it_all_happened()
    answers = [request.output_token_ids for request in crowd.answered]
    logprobs = [entry.logprob for request in crowd.answered for entry in crowd.logprobs(request)]
    logprobs += [entry.logprob for entry in crowd.long.prompt_logprobs]
    vectors = [value for request in crowd.pooled for value in request.embedding]
    prompt = list(range(3, 12))
    others = [
        request_of("drawn", prompt, temperature=1.0),
        request_of(
            "penalised", prompt, temperature=0.8, top_k=9, repetition_penalty=1.3, logprobs=None
        ),
    ]
    loop = Loop(
        Masked(runner), num_blocks=FEW_BLOCKS, max_num_batched_tokens=CHUNK, max_steps_in_flight=2
    )
    # Who is greedy but for a mask is alone in a step: nothing else says that ids are drawn.
    masked = request_of(MASKED, prompt, temperature=0.0, logprobs=None)
    answers += loop.run(others) + loop.run([masked])
    assert all(token % 2 == 0 for token in answers[-1])
    return answers, logprobs, vectors


def drafted(runner, **params) -> list[int]:
    """An answer for which some drafts are right and some are not."""
    prompt = list(range(20, 29))
    plain = request_of("plain", prompt, logprobs=None, **params)
    Loop(runner, max_num_batched_tokens=CHUNK).run([plain])

    def propose(request, max_tokens: int) -> list[int]:
        drafts = plain.token_ids[request.num_tokens :][:max_tokens]
        return [token if (request.num_tokens + i) % 4 else 3 for i, token in enumerate(drafts)]

    loop = Loop(
        runner, propose=propose, speculative=lookup(NUM_DRAFTS), max_num_batched_tokens=CHUNK
    )
    [answer] = loop.run([request_of("drafted", prompt, logprobs=None, **params)])
    assert answer == plain.output_token_ids
    assert len(loop.plans) < len(answer)
    return answer


@pytest.fixture(params=[False, True], ids=["host", "device"])
def on_device(request) -> bool:
    return request.param


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path, random_checkpoint(LLAMA, tmp_path)


def lead(shares, on_device) -> tuple[LeadRunner, Threads]:
    """The runner of two ranks."""
    followers = Threads()
    teams = [ThreadTeam(share._ranks, followers) for share in shares]
    followers.thread = threading.Thread(
        target=partial(_until_the_end, build, shares[1], on_device=on_device, team=teams[1])
    )
    followers.thread.start()
    return build(shares[0], on_device=on_device, team=teams[0]), followers


@pytest.fixture
def led(checkpoint, on_device):
    """The runner of two ranks, and the model of one."""
    path, config = checkpoint
    runner, followers = lead(load_shares(path, config, 2, **OPTIONS), on_device)
    yield runner, load_model(path, config=config, **OPTIONS), followers
    runner.close()


def _until_the_end(work: Callable, *args, **options) -> None:
    with pytest.raises(SystemExit):
        work(*args, **options)


def test_ranks_serve_what_one_device_serves(led, on_device) -> None:
    runner, whole, followers = led
    before, steps = followers.messages, runner.num_compilations
    answers, logprobs, vectors = serve(runner)
    assert followers.messages > before
    assert runner.num_compilations == steps
    alone = build(whole, on_device=on_device)
    expected = serve(alone)
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "frequency_penalty": 0.5}):
        assert drafted(runner, **params) == drafted(alone, **params)
    alone.close()
    assert answers == expected[0]
    for found, wanted in ((logprobs, expected[1]), (vectors, expected[2])):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_ranks_that_are_closed_hold_neither_shares_nor_caches(checkpoint, on_device) -> None:
    shares = load_shares(*checkpoint, 2, **OPTIONS)
    held = [weakref.ref(share) for share in shares]
    runner, followers = lead(shares, on_device)
    own = runner._own
    caches = own._block_caches
    held.append(weakref.ref(caches[0]))
    del shares, own, caches
    assert None not in [ref() for ref in held]
    runner.close()
    assert followers.failure is None
    assert [ref() for ref in held] == [None] * 3


class Stuck:
    """A runner whose steps do not end."""

    num_compilations = 0

    def __init__(self) -> None:
        self.death = Death()
        self.on_death = self.death.on_death

    def launch(self, plan) -> None:
        pass

    def sample(self, step_id: int, masks) -> Future:
        return Future()

    def close(self) -> None:
        pass


def test_a_step_that_does_not_end_is_the_end_of_all() -> None:
    times = iter([0.0])
    runner = LeadRunner(Stuck(), Threads(), {}, clock=lambda: next(times, STEP_LIMIT_S + 1.0))
    runner.launch(plan_of(1))
    error = runner.sample(1).exception(60)
    assert isinstance(error, DeviceDeadError)
    assert "no step has ended on all ranks for 300 s" in str(error)
    runner.close()


@pytest.mark.parametrize("is_first_rank", [False, True])
def test_a_rank_that_dies_while_nobody_asks_is_heard_of_once(is_first_rank) -> None:
    own, followers, heard = Stuck(), Threads(), []
    runner = LeadRunner(own, followers, {})
    runner.on_death(heard.append)
    assert heard == []
    error = DeviceDeadError("it has died")
    (own.death.tell if is_first_rank else followers.fail)(error)
    assert heard == [error]
    assert followers.failure is error, "they end with it"
    followers.fail(DeviceDeadError("so has another"))
    own.death.tell(DeviceDeadError("so has the first"))
    assert heard == [error]
    runner.close()


def test_a_runner_that_dies_while_it_follows_says_so() -> None:
    runner, said = Stuck(), []

    def receive() -> None:
        runner.death.tell(DeviceDeadError("it has died"))

    follow(receive, runner, {}, said.append)
    assert said == [runner.death.cause]


def test_the_rank_with_the_least_room_decides(checkpoint) -> None:
    share = load_shares(*checkpoint, 2, **OPTIONS)[0]
    memory = memory_for(share, num_blocks=50)
    team = SimpleNamespace(least=lambda number: number - 7)
    found = agreed(memory, team)
    assert (found.num_blocks, found.kv_bytes) == (43, 43 * memory.kv_bytes_per_block)
    assert agreed(memory, None) is memory


def plan_of(step_id: int) -> SchedulerOutput:
    params = SamplingParams(temperature=0.0)
    return SchedulerOutput(
        step_id,
        new_requests=[NewRequest(f"r{step_id}", [5, 6], 2, params, seed=0, choice_index=0)],
        scheduled=[ScheduledRequest(f"r{step_id}", 0, [5, 6], [0], 1, 0)],
    )


def test_a_rank_that_fails_is_the_end_of_all_steps(led) -> None:
    runner, _, followers = led
    runner.launch(plan_of(1))
    runner.sample(1).result(60)
    runner.launch(plan_of(2))
    error = DeviceDeadError("rank 1 has died")
    future = runner.sample(2)
    followers.fail(error)
    assert future.exception(60) in (error, None)  # it may have been there already
    for call in (lambda: runner.launch(plan_of(3)), lambda: runner.sample(3)):
        with pytest.raises(DeviceDeadError, match="rank 1"):
            call()
