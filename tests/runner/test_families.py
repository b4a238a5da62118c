"""Every family on random weights, behind the real scheduler, KV cache manager and runner.

The judge is transformers, or what `references` has for models that it does not carry. One run has
all that can happen to a prompt: it comes in chunks, beside others that decode, after its whole was
computed before or a part of it up to the middle of a block, and once more after a preemption.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import streamserve_kernels
from streamserve.core.plan import TokenLogprobs
from streamserve.core.pooling import Pooling
from streamserve.core.request import Request
from streamserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from streamserve.models import (
    Decoder,
    LanguageModel,
    ModelConfig,
    allocate_kv_cache,
    load_config,
    load_model,
)
from streamserve.models.catalogue import (
    GUESSES,
    THROUGH_TRANSFORMERS,
    features_of,
    native_entries,
)
from streamserve.models.families import FAMILIES, find_family
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec, RopeScaling
from streamserve.runner.model_runner import TorchModelRunner
from tests.models.foreign import FOREIGN
from tests.models.native import ENDS, GQA, HYBRID, LONGER, NATIVE, config_values
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import assert_unasked_rows_change_nothing
from tests.models.random_model import random_model
from tests.runner.loop import BLOCK_SIZE, NUM_BLOCKS, Loop
from tests.runner.tiny_llama import CPU, MAX_LEN

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97
CHUNK = 11
NUM_GREEDY = 32
# Too few for all of them at once.
FEW_BLOCKS = 40
VECTORS = {"last": lambda states: states[-1], "mean": lambda states: states.mean(0)}


@dataclass
class Pair:
    """The same weights twice: the judge's model and ours, loaded from what it saved."""

    judge: torch.nn.Module
    config: ModelConfig
    ours: LanguageModel

    @classmethod
    def of(cls, name: str, directory: Path) -> Pair:
        is_foreign = name.startswith("transformers-")
        made = FOREIGN[name.removeprefix("transformers-")]() if is_foreign else NATIVE[name]()
        judge = random_model(made)
        judge.save_pretrained(directory)
        config = load_config(directory, model_impl="transformers" if is_foreign else "native")
        ours = load_model(
            directory,
            dtype=torch.float32,
            device=CPU,
            kernels=streamserve_kernels.load(CPU, "cpu"),
            config=config,
            max_model_len=LONGER.get(name),
        )
        return cls(judge, config, ours)

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.judge(torch.tensor([token_ids])).logits[0]

    def states(self, token_ids: list[int]) -> torch.Tensor:
        """Of a model through transformers: those before its head."""
        trunk = self.judge.get_submodule(self.ours.spec.trunk)
        with torch.inference_mode():
            return trunk(input_ids=torch.tensor([token_ids])).last_hidden_state[0]


CASES = [*NATIVE, *(f"transformers-{name}" for name in FOREIGN)]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.of(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def runner(pair: Pair) -> Iterator[TorchModelRunner]:
    ours = pair.ours
    caches = allocate_kv_cache(ours.spec, NUM_BLOCKS, BLOCK_SIZE, ours.dtype, CPU, ours.kernels)
    for cache in (cache for both in caches for cache in both):
        cache.normal_(0.0, 10.0)  # a read of a wrong or stale row shows
    runner = TorchModelRunner(
        ours,
        caches,
        vocab_size=VOCAB,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=CHUNK,
    )
    yield runner
    runner.close()


def request_of(name: str, token_ids: list[int], **params) -> Request:
    options = {"temperature": 0.0, "max_tokens": NUM_GREEDY, "logprobs": MAX_LOGPROBS, **params}
    return Request(name, token_ids, SamplingParams(**options), arrival_time=0.0, seed=0)


class Crowd:
    """Requests that meet all that can happen to a prompt, and a loop that has served them."""

    def __init__(self, runner: TorchModelRunner, pools: list[Pooling]) -> None:
        rng = random.Random(3)

        def tokens(count: int) -> list[int]:
            return [rng.randrange(3, VOCAB) for _ in range(count)]

        start = tokens(34)
        self.long = request_of("long", start, prompt_logprobs=MAX_LOGPROBS)
        self.greedy = request_of("greedy", tokens(9), logprobs=None)
        self.single = request_of("single", tokens(1))
        self.again = request_of("again", start)
        self.branch = request_of("branch", start[:30] + tokens(17))
        self.pooled = [
            request_of(f"pooled{i}", start[:22] + tokens(i), max_tokens=1, logprobs=None, pooling=p)
            for i, p in enumerate(pools)
        ]
        self.answered = [self.long, self.greedy, self.single, self.again, self.branch]
        self.loop = loop = Loop(runner, num_blocks=FEW_BLOCKS, max_num_batched_tokens=CHUNK)
        for request in (self.long, self.greedy, self.single):
            loop.scheduler.add(request)
        while not all(r.output_token_ids for r in (self.long, self.greedy, self.single)):
            loop.turn()
        loop.run([self.again, self.branch, *self.pooled])

    def logprobs(self, request: Request) -> list[TokenLogprobs]:
        """Of its answer."""
        return [entry for u in self.loop.updates if u.request is request for entry in u.logprobs]

    def assert_that_it_all_happened(self) -> None:
        plans = self.loop.plans
        parts = [part for plan in plans for part in plan.scheduled]
        assert any(p.request_id == "long" and p.start and len(p.token_ids) > 1 for p in parts)
        assert any(
            any(p.request_id == "branch" and len(p.token_ids) > 1 for p in plan.scheduled)
            and any(p.output_position and len(p.token_ids) == 1 for p in plan.scheduled)
            for plan in plans
        )
        assert (self.again.num_cached_tokens, self.branch.num_cached_tokens) == (32, 30)
        assert any(plan.block_copies for plan in plans)
        assert any(plan.prefix_groups for plan in plans)
        assert sum(request.num_preemptions for request in self.answered) > 0


def assert_logprobs(entries: list[TokenLogprobs], logits: torch.Tensor) -> None:
    """The likeliest tokens of each row, against all of its logits [T, V]."""
    expected = logits.log_softmax(-1)
    token_ids, values = (
        torch.tensor([[pair[part] for pair in entry.top] for entry in entries]) for part in (0, 1)
    )
    assert token_ids.shape == (len(logits), MAX_LOGPROBS)
    close = partial(torch.testing.assert_close, values, rtol=1e-4, atol=1e-4)
    close(expected.gather(1, token_ids))
    close(expected.topk(MAX_LOGPROBS).values)


def test_logits_and_greedy_tokens_are_the_judges(pair: Pair, runner: TorchModelRunner) -> None:
    """A forward of the judge over prompt and answer checks each token that was drawn.

    If every token is the likeliest after what stands before it, the judge's own greedy answer is
    the same, by induction over the tokens.
    """
    pools = []
    if not isinstance(pair.ours, Decoder):
        pools = [Pooling(kind=kind, normalize=False) for kind in VECTORS]
    crowd = Crowd(runner, pools)
    crowd.assert_that_it_all_happened()
    for request in crowd.answered:
        logits = pair.logits(request.token_ids)
        first = request.num_prompt_tokens - 1
        assert request.output_token_ids == logits[first:-1].argmax(-1).tolist()
        if request.prompt_logprobs is not None:
            assert_logprobs(request.prompt_logprobs, logits[:first])
        if request.sampling_params.logprobs is not None:
            assert_logprobs(crowd.logprobs(request), logits[first:-1])
    for request, pool in zip(crowd.pooled, pools, strict=True):
        expected = VECTORS[pool.kind](pair.states(request.token_ids))
        torch.testing.assert_close(torch.tensor(request.embedding), expected, rtol=1e-4, atol=1e-4)


def test_rows_that_nobody_asked_for_change_nothing(pair: Pair) -> None:
    assert_unasked_rows_change_nothing(pair.ours)


def test_a_warm_up_of_few_layers_meets_each_kind(pair: Pair) -> None:
    """The thin copy writes only its own layers' caches, and leaves the model as it is."""
    decoder = pair.ours
    thin = decoder.one_of_each_layer()
    harness = PagedHarness(decoder)
    before = [caches[0].clone() for caches in harness.caches]
    batch = harness.batch([(Sequence([5, 6, 7]), 3)])
    with torch.inference_mode():
        assert thin.forward(batch, harness.caches).shape == (1, VOCAB)
    written = [
        not torch.equal(caches[0], old) for caches, old in zip(harness.caches, before, strict=True)
    ]
    attentions = decoder.spec.attentions()
    assert {a for a, w in zip(attentions, written, strict=True) if w} == set(attentions)
    shares = isinstance(decoder, Decoder) and len(written) < len(decoder.spec.layers)
    assert shares or written[-1]  # the last layer may have no cache of its own


def test_weights_are_counted_before_they_are_there(pair: Pair) -> None:
    assert pair.ours.nbytes <= pair.config.weight_bytes(torch.float32)


def specs_of_cases() -> dict[str, list[DecoderSpec]]:
    """By architecture."""
    specs: dict[str, list[DecoderSpec]] = {}
    for name in (*NATIVE, *HYBRID):
        config = HfConfig(config_values(name))
        family = find_family(config)
        specs.setdefault(family.architecture, []).append(family.spec(config))
    return specs


def test_every_row_of_the_table_has_its_cases() -> None:
    """`streamserve models`: each architecture, and whatever is said of it."""
    specs = specs_of_cases()
    entries = {entry.architecture: entry for entry in native_entries()}
    assert specs.keys() == entries.keys()
    for architecture, entry in entries.items():
        said = set(entry.features) - {GUESSES}  # heads have tests of their own
        assert said <= set(features_of(specs[architecture])), architecture
    foreign = {config().model_type for config in FOREIGN.values()}
    assert foreign - {family.model_type for family in FAMILIES.values()} == set(
        THROUGH_TRANSFORMERS
    )


def test_every_axis_of_a_spec_is_some_familys() -> None:
    """What nobody needs is no axis: it would be a branch of the forward for nothing."""
    values: dict[str, set[Any]] = {}

    def visit(part: Any) -> None:
        if isinstance(part, tuple):
            for inner in part:
                visit(inner)
        elif is_dataclass(part) and not isinstance(part, RopeScaling):  # a table knows it, no step
            for axis in fields(part):
                value = getattr(part, axis.name)
                values.setdefault(f"{type(part).__name__}.{axis.name}", set()).add(value)
                visit(value)

    for spec in (spec for specs in specs_of_cases().values() for spec in specs):
        visit(spec)
    of_heads = {"DecoderSpec.join"}  # which have tests of their own
    alone = {axis for axis, found in values.items() if len(found) < 2}
    assert alone == {"DecoderSpec.vocab_size", *of_heads}


def test_the_first_gemma_says_gelu_and_means_its_tanh_form() -> None:
    values = transformers.GemmaConfig(**GQA, **ENDS).to_dict()
    family = FAMILIES["GemmaForCausalLM"]
    assert family.spec(HfConfig(values)) == family.spec(HfConfig({**values, "hidden_act": "gelu"}))
