"""What a draft head is given: at each position the target's own hidden state, and the next token.

The head here keeps what it is given in its caches and looks, at every guess, whether all of it is
what the target finds in the whole text; it guesses what the text goes on with.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import wait
from threading import current_thread
from types import SimpleNamespace

import pytest
import torch

import streamserve_kernels
from streamserve.config import SpeculativeConfig
from streamserve.core.pooling import Pooling
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.models import Decoder, ForwardBatch, allocate_kv_cache
from streamserve.runner import head_drafter
from streamserve.runner.build import build_runner, new_kv_cache
from streamserve.runner.cuda.build import build_cuda_runner
from streamserve.runner.cuda.head_steps import DeviceHeadSteps
from streamserve.runner.cuda.model_runner import CudaModelRunner
from streamserve.runner.cuda.step_key import StepLadder
from streamserve.runner.drafting import DraftingRunner
from streamserve.runner.head_drafter import HeadDrafter
from streamserve.runner.head_steps import HeadSteps, HostHeadSteps
from streamserve.runner.model_runner import TorchModelRunner
from tests.runner.loop import BLOCK_SIZE, NUM_BLOCKS, Loop, forget
from tests.runner.test_speculation import (
    MAX_SEQS,
    MAX_TOKENS,
    random_options,
    random_requests,
    summary,
)
from tests.runner.tiny_llama import CPU, MAX_LEN, VOCAB, memory_for, tiny_llama

MAX_DRAFTS = 4
ROWS = MAX_SEQS * (1 + MAX_DRAFTS)


class Target:
    """A runner, as on the host or as for a device, and what its model finds in a text."""

    def __init__(self, model: Decoder, *, on_device: bool) -> None:
        self.model = model
        model.tap(WatchingHead.taps)
        self.on_device = on_device
        memory = memory_for(
            model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_SEQS
        )
        options = {"max_num_batched_tokens": MAX_TOKENS, "keeps_hidden_states": True}
        if on_device:
            ladder = StepLadder(MAX_TOKENS, MAX_SEQS, num_drafts=MAX_DRAFTS, max_num_sampled=ROWS)
            caches = new_kv_cache(model.spec, memory, model.dtype, CPU, model.kernels)
            runner, _ = build_cuda_runner(model, memory, ladder, kv_caches=caches, **options)
        else:
            runner, _ = build_runner(model, memory, max_num_sampled=ROWS, **options)
        assert isinstance(runner, TorchModelRunner | CudaModelRunner)
        self.runner = runner

    def steps_of(self, head: WatchingHead) -> HeadSteps:
        made = DeviceHeadSteps if self.on_device else HostHeadSteps
        return made(
            head,
            [(head.next_ids, head.states)],
            block_size=BLOCK_SIZE,
            max_model_len=MAX_LEN,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_TOKENS + ROWS,
        )

    def hidden_states(self, token_ids: list[int]) -> torch.Tensor:
        model, length = self.model, len(token_ids)
        num_blocks = -(-length // BLOCK_SIZE)
        caches = allocate_kv_cache(
            model.spec, num_blocks, BLOCK_SIZE, model.dtype, CPU, model.kernels
        )
        batch = ForwardBatch(
            input_ids=torch.tensor(token_ids),
            positions=torch.arange(length),
            slot_mapping=torch.arange(length),
            query_start_loc=torch.tensor([0, length], dtype=torch.int32),
            seq_lens=torch.tensor([length], dtype=torch.int32),
            block_table=torch.arange(num_blocks, dtype=torch.int32)[None],
            logits_indices=torch.arange(length),
        )
        with torch.inference_mode():
            return model.all_states(batch, caches)[1]


class Text:
    def __init__(self, token_ids: list[int], states: torch.Tensor) -> None:
        self.token_ids, self.states = token_ids, states


class WatchingHead:
    """A `DraftHead` that knows the answers. What it finds is the number of the guess, but first
    no number: so it is told from what the target finds.
    """

    taps = (1, 2)
    dtype = torch.float32
    device = CPU
    nbytes = 0
    kernels = streamserve_kernels.load(CPU, "naive")

    def __init__(self, texts: list[Text], accuracy: float, rng: random.Random) -> None:
        self.texts, self.accuracy, self.rng = texts, accuracy, rng
        width = texts[0].states.shape[1]
        self.spec = SimpleNamespace(vocab_size=VOCAB, hidden_size=width)
        self.next_ids = torch.full((NUM_BLOCKS, BLOCK_SIZE), -1)
        self.states = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, width)
        self.num_fed = 0
        self.threads: set[str] = set()
        self.guessed_behind: list[list[int]] = []
        self.num_foreign: list[int] = []  # of each guess: positions whose next token is another's

    def take(self, states: torch.Tensor) -> torch.Tensor:
        self.num_fed += len(states)
        self.threads.add(current_thread().name)
        return states.clone()

    def guess(self, batch: ForwardBatch, kv_caches) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.hidden_states is not None
        assert len(batch.hidden_states) == len(batch.input_ids)
        is_token = batch.slot_mapping >= 0  # others are padding
        slots = batch.slot_mapping[is_token]
        self.next_ids.view(-1)[slots] = batch.input_ids[is_token]
        self.states.view(NUM_BLOCKS * BLOCK_SIZE, -1)[slots] = batch.hidden_states[is_token]
        ends = batch.query_start_loc.tolist()[1:]
        guesses = []
        found = torch.full((len(batch.logits_indices), self.states.shape[2]), torch.nan)
        for i, row in enumerate(batch.logits_indices.tolist()):
            place = next((place for place, end in enumerate(ends) if row < end), None)
            if place is None:
                guesses.append(0)
                continue
            blocks = batch.block_table[place].long()
            length = int(batch.positions[row]) + 1
            next_ids = self.next_ids[blocks].view(-1)[:length].tolist()
            states = self.states[blocks].view(len(blocks) * BLOCK_SIZE, -1)[:length]
            found[i, 1:] = len(self.guessed_behind)
            guesses.append(self.check(next_ids, states))
        return torch.tensor(guesses, dtype=torch.int64), found

    def check(self, next_ids: list[int], states: torch.Tensor) -> int:
        """All but the guesses that it goes on from is of one of the texts."""
        num_known = int((~states.isnan().any(1)).sum())
        assert not states[:num_known].isnan().any()
        for position in range(num_known, len(next_ids)):
            behind = self.guessed_behind[int(states[position, 1])]
            assert behind == next_ids[:position], "goes on from another's guess"
        self.guessed_behind.append(next_ids)
        fits = [
            text
            for text in self.texts
            if len(text.token_ids) >= num_known
            and torch.allclose(text.states[:num_known], states[:num_known], atol=1e-4)
        ]
        assert fits, "hidden states of no text"
        text = min(fits, key=lambda text: _num_other(text, next_ids, num_known))
        self.num_foreign.append(_num_other(text, next_ids, num_known))
        after = text.token_ids[len(next_ids) + 1 :]
        is_wrong = text.token_ids[num_known + 1 : len(next_ids) + 1] != next_ids[num_known:]
        if is_wrong or not after or self.rng.random() >= self.accuracy:
            return self.rng.randrange(VOCAB)
        return after[0]


def _num_other(text: Text, next_ids: list[int], num_known: int) -> int:
    expected = text.token_ids[1 : num_known + 1]
    return sum(a != b for a, b in zip(expected, next_ids, strict=False))


@pytest.fixture(scope="module", params=["naive", "cpu", "naive on a device"])
def target(request, tmp_path_factory) -> Iterator[Target]:
    backend, _, on_device = request.param.partition(" ")
    model = tiny_llama(tmp_path_factory.mktemp("model"), backend=backend)
    target = Target(model, on_device=bool(on_device))
    yield target
    target.runner.close()


def watched(
    target: Target, requests: list[Request], accuracy: float
) -> tuple[DraftingRunner, WatchingHead]:
    """``requests`` have been answered before."""
    forget(target.runner)
    texts = [Text(r.token_ids, target.hidden_states(r.token_ids)) for r in requests]
    head = WatchingHead(texts, accuracy, random.Random(1))
    drafter = HeadDrafter(
        target.steps_of(head),
        lambda: target.runner.hidden_states,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=MAX_TOKENS + ROWS,
    )
    return DraftingRunner(target.runner, drafter), head


def by_a_head(num_drafts: int) -> SpeculativeConfig:
    return SpeculativeConfig(num_speculative_tokens=num_drafts, method="mtp")


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_get_the_same_answers(target, seed):
    rng = random.Random(seed)
    options = random_options(rng)
    forget(target.runner)
    loop, plain = Loop(target.runner, **options), random_requests(seed)
    loop.run(plain)
    expected = summary(loop, plain)
    for accuracy in (1.0, 0.6):
        runner, head = watched(target, plain, accuracy)
        loop = Loop(runner, **options, speculative=by_a_head(rng.choice([1, MAX_DRAFTS])))
        drafted = random_requests(seed)
        loop.run(drafted)
        assert summary(loop, drafted) == expected
        assert not runner._has_failed
        assert max(head.num_foreign, default=0) <= options["prefix"]


@pytest.mark.parametrize(("accuracy", "num_steps"), [(1.0, 7), (0.0, 24)])
def test_right_guesses_save_steps_and_wrong_ones_cost_none(target, accuracy, num_steps):
    params = SamplingParams(temperature=0.0, max_tokens=24)
    requests = [Request("r", [5, 9, 13], params, arrival_time=0.0, seed=1) for _ in range(2)]
    forget(target.runner)
    Loop(target.runner).run(requests[:1])
    runner, head = watched(target, requests[:1], accuracy)
    loop = Loop(runner, speculative=by_a_head(MAX_DRAFTS))
    assert loop.run(requests[1:]) == [requests[0].output_token_ids]
    assert len(loop.updates) == num_steps
    stats = loop.scheduler.speculation_stats
    assert (stats.num_accepted_tokens == stats.num_draft_tokens) == (accuracy == 1.0)
    assert head.num_fed == 3 + 23, "each position once"


def test_a_step_that_is_over_at_once_is_followed_where_it_resolves(target, monkeypatch):
    """Whoever asked for it has not even got its future yet; by then its hidden states are gone."""
    params = SamplingParams(temperature=0.0, max_tokens=24)
    requests = [Request("r", [5, 9, 13], params, arrival_time=0.0, seed=1) for _ in range(2)]
    forget(target.runner)
    Loop(target.runner).run(requests[:1])
    runner, head = watched(target, requests[:1], 1.0)
    sample = target.runner.sample

    def over_at_once(*asked, **options):
        future = sample(*asked, **options)
        wait([future])
        return future

    monkeypatch.setattr(target.runner, "sample", over_at_once)
    loop = Loop(runner, speculative=by_a_head(MAX_DRAFTS))
    assert loop.run(requests[1:]) == [requests[0].output_token_ids]
    assert not runner._has_failed
    assert len(loop.updates) == 7
    assert head.threads == {"streamserve-results" if target.on_device else "streamserve-device"}


def test_while_guesses_do_not_pay_the_head_rests(target):
    """What it would have been fed is kept; of who has more than is kept nothing is guessed."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    prompt = [random.Random(4).randrange(VOCAB) for _ in range(40)]
    requests = [Request("r", prompt, params, arrival_time=0.0, seed=1) for _ in range(3)]
    forget(target.runner)
    Loop(target.runner).run(requests[:1])
    row_bytes = 2 * target.model.spec.hidden_size * target.model.dtype.itemsize
    for request, most, num_fed in ((requests[1], 59, 99), (requests[2], 20, 40)):
        runner, head = watched(target, requests[:1], 1.0)
        loop = Loop(runner, speculative=by_a_head(MAX_DRAFTS))
        speculator = loop.scheduler._speculator
        speculator._best_count = lambda *_: 0
        loop.scheduler.add(request)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_drafter, "_UNFED_BYTES", most * row_bytes)
            while request.num_output_tokens < 30:
                loop.turn()
            assert head.num_fed == 40, "of the prompt, when nobody had been asked"
            speculator._best_count = lambda *_: MAX_DRAFTS
            loop.run([])
        assert request.output_token_ids == requests[0].output_token_ids
        assert head.num_fed == num_fed
        stats = loop.scheduler.speculation_stats
        assert stats.num_accepted_tokens == stats.num_draft_tokens
        assert bool(stats.num_draft_tokens) == (num_fed > 40)


@pytest.mark.parametrize(
    "asked",
    [
        {"pooling": Pooling(kind="last", normalize=True)},
        {"pooling": Pooling(kind="mean", normalize=False)},
        {"prompt_logprobs": 1},
    ],
)
def test_what_others_ask_of_their_prompts_disturbs_no_guesses(target, asked):
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    requests = [Request("r", [5, 9, 13], params, arrival_time=0.0, seed=1) for _ in range(2)]
    forget(target.runner)
    Loop(target.runner).run(requests[:1])
    runner, head = watched(target, requests[:1], 1.0)
    loop = Loop(runner, speculative=by_a_head(1))
    loop.scheduler.add(requests[1])
    while requests[1].num_output_tokens < 10:
        loop.turn()
    params = SamplingParams(max_tokens=1, **asked)
    loop.run([Request("v", [3, 4, 5], params, arrival_time=0.0, seed=1)])
    assert requests[1].output_token_ids == requests[0].output_token_ids
    assert not runner._has_failed
    assert head.num_fed == 3 + 39 + 3 * (params.pooling is None)


def test_a_step_that_goes_back_takes_what_was_kept_behind_it():
    """As behind one that failed; what was fed is fed again, and a gap ends it."""
    request = head_drafter._Fed(token_ids=[], num_fed=10)

    def rows(*token_ids: int) -> head_drafter._Rows:
        return head_drafter._Rows(list(token_ids), torch.tensor([[float(i)] for i in token_ids]))

    def kept() -> list[int]:
        ids = [token_id for part in request.unfed for token_id in part.next_ids]
        assert [part.states[:, 0].tolist() for part in request.unfed] == [
            [float(i) for i in part.next_ids] for part in request.unfed
        ]
        assert request.num_unfed == len(ids)
        return ids

    request.remember(10, rows(1, 2, 3))
    request.remember(13, rows(4))
    request.remember(12, rows(5, 6))
    assert kept() == [1, 2, 5, 6]
    assert [part.next_ids for part in request.take(3)] == [[1, 2], [5]]
    assert kept() == [6]
    request.num_fed = 13
    request.remember(11, rows(7, 8))
    assert (request.num_fed, kept()) == (11, [7, 8])
    request.remember(14, rows(9))
    assert request.is_lost
    assert kept() == []
