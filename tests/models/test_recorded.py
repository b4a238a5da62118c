"""A forward that was recorded does what it does function by function, and what the naive one does.

Every family on offer and every axis of a spec, with random weights: the heads are widened to what
the native cache takes.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import streamserve_kernels
from streamserve.models import Decoder, load_config, state_caches
from streamserve.models.checkpoint import RandomSource
from streamserve.models.families import FAMILIES
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import AttentionSpec, DecoderSpec, ExpertsSpec, MlpSpec
from streamserve.models.weights import build_weights
from streamserve_kernels.native.library import why_not
from tests.models import native, test_axes
from tests.models.paged import PagedHarness, Sequence

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
CPU = torch.device("cpu")
MAX_TOKENS = 64
LENGTHS = {"a": 40, "b": 3, "c": 25, "d": 100}
# What each step computes of whom, the rows of padding, and whether all rows need logits.
STEPS = [
    ({"a": 13, "c": 5}, 0, False),  # chunks, and nobody needs logits
    ({"a": 24, "b": 1, "c": 17, "d": 10}, 3, False),
    ({"a": 1, "b": 1, "c": 1}, 0, True),  # decodes
    ({"a": 1, "d": 80}, 0, True),  # too large
    ({"a": 1, "b": 1, "c": 1, "d": 10}, 1, False),  # c is not done: fewer rows than requests
    ({"c": 1}, 0, False),
]


class Source(RandomSource):
    """Norms and biases matter too."""

    def fill(self, module, leaf, target):
        super().fill(module, leaf, target)
        if leaf == "bias" or module.role != "linear":
            is_factor = module.role == "norm" or module.name == "layers.scalar"
            mean = 1.0 if is_factor and leaf == "weight" else 0.0
            target.normal_(mean, 0.3, generator=self._generator(target.device))


def widened(spec: DecoderSpec) -> DecoderSpec:
    def wide(attention: AttentionSpec) -> AttentionSpec:
        factor = max(1, 16 // attention.value_head_size)
        rope = attention.rope
        return replace(
            attention,
            query_key_head_size=attention.query_key_head_size * factor,
            value_head_size=attention.value_head_size * factor,
            rope=rope and replace(rope, rotary_dim=rope.rotary_dim * factor),
        )

    layers = tuple(
        replace(layer, attention=wide(layer.attention))
        if isinstance(layer.attention, AttentionSpec)
        else layer
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def other_axes() -> dict[str, DecoderSpec]:
    layer = test_axes.LAYER_SPEC
    plain = DecoderSpec(
        vocab_size=97, hidden_size=32, layers=(layer,) * 2, final_norm=test_axes.RMS
    )

    def with_attention(**changes) -> DecoderSpec:
        changed = replace(layer, attention=replace(layer.attention, **changes))
        return replace(plain, layers=(changed, layer))

    narrow = replace(layer, attention=replace(layer.attention, query_key_head_size=8))
    return {
        "sinks": with_attention(sinks=True),
        "nothing tells order": with_attention(rope=None),
        "values of another size": with_attention(query_key_head_size=8, value_head_size=16),
        "every bias": replace(
            plain,
            head_bias=True,
            layers=(
                replace(
                    narrow,
                    attention=replace(layer.attention, qkv_bias=True, output_bias=True),
                    mlp=replace(test_axes.MLP, bias=True),
                ),
            )
            * 2,
        ),
        "scaled parallel block without final norm": replace(
            plain,
            final_norm=None,
            layers=(replace(layer, residual="parallel", residual_scale=0.5),) * 2,
        ),
        "quick gelu": replace(
            plain, layers=(replace(layer, mlp=MlpSpec(48, "quick_gelu", gated=False)),)
        ),
        "odd middle": replace(plain, layers=(replace(layer, mlp=MlpSpec(50, "silu", gated=True)),)),
    }


FAMILY_CASES = {**native.NATIVE, **native.HYBRID}


@pytest.fixture(params=[*FAMILY_CASES, *other_axes()])
def spec(request, tmp_path) -> DecoderSpec:
    name = request.param
    if name in FAMILY_CASES:
        FAMILY_CASES[name]().save_pretrained(tmp_path)
        return widened(load_config(tmp_path).spec)
    return widened(other_axes()[name])


def decoder_of(spec: DecoderSpec, backend: str, dtype=torch.bfloat16) -> Decoder:
    kernels = streamserve_kernels.load(CPU, backend)
    weights = build_weights(spec, Source(3, std=0.15), kernels, dtype, CPU)
    return Decoder(spec, weights, kernels, dtype=dtype, device=CPU, max_model_len=128)


def batches(harness: PagedHarness) -> Iterator:
    """The batch of each step; what it computes counts as computed when the next is asked for."""
    random = torch.Generator().manual_seed(5)
    sequences = {
        name: Sequence(torch.randint(0, 97, (length,), generator=random).tolist())
        for name, length in LENGTHS.items()
    }
    for counts, padding, all_rows in STEPS:
        work = [(sequences[name], count) for name, count in counts.items()]
        yield harness.batch(work, padding=padding, all_rows=all_rows)
        for sequence, count in work:
            sequence.num_computed += count


def run(decoder: Decoder, harness: PagedHarness) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [decoder.forward(batch, harness.caches).clone() for batch in batches(harness)]


def has_experts(spec: DecoderSpec) -> bool:
    return any(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers)


def test_recorded_is_eager_is_naive(spec, caplog):
    caplog.set_level(logging.INFO)
    naive = decoder_of(spec, "naive", torch.float32)
    exact = torch.cat(run(naive, PagedHarness(naive, block_size=16)))
    rounded = decoder_of(spec, "naive")
    naive_error = (torch.cat(run(rounded, PagedHarness(rounded, block_size=16))) - exact).abs()

    for threads in (1, 2):
        torch.set_num_threads(threads)
        error = (torch.cat(recorded_is_eager(spec, caplog)) - exact).abs()
        # As far from float32 as the naive kernels are in bfloat16. (A token may choose other
        # experts.)
        assert error.median() < 1.3 * naive_error.median()
        if not has_experts(spec):
            assert error.max() < 2 * naive_error.max()


def recorded_is_eager(spec: DecoderSpec, caplog: pytest.LogCaptureFixture) -> list[torch.Tensor]:
    """The logits of each recorded step, with as many threads as torch has now."""
    decoder = decoder_of(spec, "native")
    eager = PagedHarness(decoder, block_size=16)
    expected = run(decoder, eager)

    recorded = PagedHarness(decoder, block_size=16)
    caplog.clear()
    num_recorded = decoder.record(recorded.caches, max_tokens=MAX_TOKENS, max_logits=MAX_TOKENS)
    assert num_recorded == MAX_TOKENS
    assert "function by function" not in caplog.text
    logits = run(decoder, recorded)
    is_plain = spec.logit_scale == 1.0 and spec.logit_soft_cap is None
    for ours, theirs in zip(logits, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        if is_plain:  # the only difference: eager logits are rounded
            assert torch.equal(ours.bfloat16().float(), theirs)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=8e-3)
    for ours, theirs in zip(recorded.caches, eager.caches, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    return logits


def test_greedy_is_the_arg_max_of_the_logits(spec):
    decoder = decoder_of(spec, "native")
    harness = PagedHarness(decoder, block_size=16)
    decoder.record(harness.caches, max_tokens=MAX_TOKENS, max_logits=MAX_TOKENS)
    with torch.inference_mode():
        for batch in batches(harness):
            is_recorded = batch.input_ids.shape[0] <= MAX_TOKENS
            states = state_caches(spec, harness.caches)
            before = [state.clone() for state in states]
            token_ids = decoder.greedy(batch, harness.caches)
            assert (token_ids is not None) == is_recorded
            for state, old in zip(states, before, strict=True):  # a step passes them once
                state.copy_(old)
            logits = decoder.forward(batch, harness.caches)
            if token_ids is not None:
                assert token_ids.dtype == torch.int64
                assert torch.equal(token_ids, logits.argmax(-1))


LAYER = test_axes.LAYER_SPEC
WIDE = replace(LAYER.attention, query_key_head_size=16, value_head_size=16, qkv_bias=True)
PLAIN = replace(LAYER, attention=WIDE)
SHARING = {
    "plain": (PLAIN, PLAIN),
    "odd ends": (
        replace(LAYER, attention=replace(WIDE, sinks=True, soft_cap=2.0)),
        replace(LAYER, attention=replace(WIDE, rope=None, alibi=True)),
    ),
    # One cuts the prefix, one comes to cut it, and one never does.
    "windows": tuple(
        replace(LAYER, attention=replace(WIDE, window=window)) for window in (20, 66, 200)
    ),
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_shared_prefix_is_read_as_each_ones_own(kind, threads):
    torch.set_num_threads(threads)
    spec = DecoderSpec(vocab_size=97, hidden_size=32, layers=SHARING[kind], final_norm=None)
    decoder = decoder_of(spec, "native")
    random = torch.Generator().manual_seed(6)
    prefix, *ends = (
        torch.randint(0, 97, (length,), generator=random).tolist() for length in (50, 3, 30, 1, 17)
    )

    def run_group(*, cascade: bool, records: bool) -> tuple[torch.Tensor, int]:
        harness = PagedHarness(decoder, block_size=16, cascade=cascade)
        if records:
            assert decoder.record(harness.caches, max_tokens=64, max_logits=64)
        sequences = [Sequence(prefix + end) for end in ends]
        rows = harness.prefill(sequences[:1], None)
        for sequence in sequences[1:]:
            harness.share_prefix(sequence, sequences[0])
            assert sequence.num_computed == 48
        rows += harness.prefill(sequences[1:], 7)
        for sequence in sequences:
            sequence.tokens += prefix[:5]
        for _ in range(5):
            rows.append(harness.step([(sequence, 1) for sequence in sequences], all_rows=True))
        return torch.cat(rows).clone(), harness.num_members

    expected, num_members = run_group(cascade=False, records=False)
    assert num_members == 0
    bound = 0.02 * expected.abs().max()
    for records in (False, True):
        logits, num_members = run_group(cascade=True, records=records)
        assert num_members > 5 * len(ends)
        assert (logits - expected).abs().max() < bound


def test_a_recorded_step_reads_a_shared_prefix_once():
    spec = DecoderSpec(vocab_size=97, hidden_size=32, layers=SHARING["plain"], final_norm=None)
    decoder = decoder_of(spec, "native")
    harness = PagedHarness(decoder, block_size=16, cascade=True)
    decoder.record(harness.caches, max_tokens=64, max_logits=8)
    sequences = [Sequence([*range(40), i]) for i in range(3)]
    harness.prefill(sequences[:1], None)
    for sequence in sequences[1:]:
        harness.share_prefix(sequence, sequences[0])
    harness.prefill(sequences[1:], None)
    for sequence in sequences:
        sequence.tokens.append(1)
    batch = harness.batch([(sequence, 1) for sequence in sequences])
    assert batch.prefix_groups is not None
    expected = decoder.forward(batch, harness.caches).clone()
    others = batch.prefix_groups.members[1:].long()
    batch.block_table[others, :2] = harness.free.pop()
    assert torch.equal(decoder.forward(batch, harness.caches), expected)


def test_a_step_that_was_not_recorded_runs_all_the_same():
    """Larger ones, those with more logits, those on other caches, and those of a thin copy."""
    decoder = decoder_of(widened(other_axes()["sinks"]), "native")
    harness = PagedHarness(decoder, block_size=16)
    elsewhere = PagedHarness(decoder, block_size=16)
    assert decoder.record(harness.caches, max_tokens=8, max_logits=2) == 8

    def is_recorded(count: int, *, all_rows: bool, at=harness, model=decoder) -> bool:
        batch = at.batch([(Sequence([5] * count), count)], all_rows=all_rows)
        token_ids = model.greedy(batch, at.caches)
        assert token_ids is None or token_ids.shape == batch.logits_indices.shape
        assert model.forward(batch, at.caches).isfinite().all()
        return token_ids is not None

    assert is_recorded(8, all_rows=False)
    assert is_recorded(2, all_rows=True)
    assert not is_recorded(9, all_rows=False)
    assert not is_recorded(3, all_rows=True)
    assert not is_recorded(1, all_rows=True, at=elsewhere)
    assert not is_recorded(1, all_rows=True, model=decoder.one_of_each_layer())


def test_a_token_that_does_not_exist_fails_its_step():
    decoder = decoder_of(widened(other_axes()["sinks"]), "native")
    harness = PagedHarness(decoder, block_size=16)
    decoder.record(harness.caches, max_tokens=8, max_logits=2)
    good, bad = (harness.batch([(Sequence([1, 2, last]), 3)]) for last in (96, 97))
    expected = decoder.forward(good, harness.caches).clone()
    for call in (decoder.forward, decoder.greedy):
        with pytest.raises(IndexError, match="outside its embedding"):
            call(bad, harness.caches)
    assert torch.equal(decoder.forward(good, harness.caches), expected)


def test_attention_of_too_many_shapes_is_not_recorded(caplog):
    caplog.set_level(logging.INFO)
    sizes = (16, 32, 48, 64, 80)
    layers = tuple(replace(PLAIN, attention=replace(WIDE, value_head_size=size)) for size in sizes)
    spec = DecoderSpec(vocab_size=97, hidden_size=32, layers=layers, final_norm=None)
    decoder = decoder_of(spec, "native")
    harness = PagedHarness(decoder, block_size=16)
    assert decoder.record(harness.caches, max_tokens=8, max_logits=2) == 0
    assert "it has attention of more than 4 shapes" in caplog.text
    assert decoder.greedy(harness.batch([(Sequence([1]), 1)]), harness.caches) is None


def test_an_odd_width_is_not_recorded(caplog):
    caplog.set_level(logging.INFO)
    layer = replace(PLAIN, mlp=replace(LAYER.mlp, intermediate_size=51))
    spec = DecoderSpec(vocab_size=97, hidden_size=32, layers=(layer,), final_norm=None)
    decoder = decoder_of(spec, "native")
    harness = PagedHarness(decoder, block_size=16)
    assert decoder.record(harness.caches, max_tokens=8, max_logits=2) == 0
    assert "function by function: it has a product" in caplog.text
    assert harness.step([(Sequence([1, 2]), 2)]).isfinite().all()


def test_a_cpu_with_matrix_units_records_few_rows(monkeypatch):
    """Both ways run on oneDNN's packed weights there."""
    for module in ("streamserve_kernels.native", "streamserve_kernels.native.linear"):
        monkeypatch.setattr(importlib.import_module(module), "has_matrix_units", lambda: True)
    values = native.NATIVE["bloom"]().to_dict()
    spec = widened(FAMILIES["BloomForCausalLM"].spec(HfConfig(values)))
    decoder = decoder_of(spec, "native")
    eager, recorded = (PagedHarness(decoder, block_size=16) for _ in range(2))
    expected = run(decoder, eager)
    assert decoder.record(recorded.caches, max_tokens=MAX_TOKENS, max_logits=MAX_TOKENS) == 8
    for ours, theirs in zip(run(decoder, recorded), expected, strict=True):
        assert torch.equal(ours.bfloat16().float(), theirs)
