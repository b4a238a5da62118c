"""What enters some layers, beside a step's logits: what draft heads are given."""

from __future__ import annotations

import pytest
import torch

import streamserve_kernels
from streamserve.models import Decoder, load_config, load_model
from streamserve.models.families import FAMILIES
from streamserve.models.hf_config import HfConfig
from streamserve.models.spec import DecoderSpec
from streamserve_kernels.native.library import why_not
from tests.models import native
from tests.models.paged import PagedHarness, Sequence
from tests.models.test_recorded import CPU, batches, decoder_of, widened

TAPS = (0, 1, 2)
TOKENS = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (19, 11)]


def tapped(decoder: Decoder, harness: PagedHarness, batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        logits, states = decoder.forward_with_all_states(batch, harness.caches)
    return logits.clone(), states.clone()


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "naive") for family in ("llama3", "qwen3-moe", "gpt-oss", "granite", "glm4")),
        *((family, "naive") for family in ("gpt-neox", "falcon-7b", "qwen3.5")),
        ("gpt-neox", "cpu"),
    ],
)
def test_taps_equal_transformers_hidden_states(family, backend, checkpoint):
    """Layers that differ, halves in parallel, norms behind a half, scaled sums, and states."""
    directory, model = checkpoint({**native.NATIVE, **native.HYBRID}[family]())
    kernels = streamserve_kernels.load(CPU, backend)
    decoder = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)
    assert isinstance(decoder, Decoder)
    decoder.tap(TAPS)
    harness = PagedHarness(decoder)
    sequences = [Sequence(tokens.tolist()) for tokens in TOKENS]
    found: list[list[torch.Tensor]] = [[], []]
    # A chunk of each, of which nobody needs logits, then the rest, then one token.
    for counts in ((7, 4), (11, 7), (1, 0)):
        work = [(sequence, n) for sequence, n in zip(sequences, counts, strict=True) if n]
        logits, states = tapped(decoder, harness, harness.batch(work))
        assert states.shape == (sum(counts), 3 * decoder.spec.hidden_size)
        for index, part in enumerate(states.split([n for _, n in work])):
            found[index].append(part)
        for sequence, n in work:
            sequence.num_computed += n

    for tokens, parts in zip(TOKENS, found, strict=True):
        with torch.inference_mode():
            expected = model(tokens[None], output_hidden_states=True)
        states = torch.cat([expected.hidden_states[tap][0] for tap in TAPS], dim=1)
        torch.testing.assert_close(torch.cat(parts), states, rtol=5e-4, atol=5e-4)
    last = model(TOKENS[0][None]).logits[0, -1:]
    torch.testing.assert_close(logits, last, rtol=5e-4, atol=5e-4)


def test_what_leaves_the_last_layer_is_not_normed(checkpoint, kernels):
    directory, model = checkpoint(native.NATIVE["llama3"]())
    decoder = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)
    assert isinstance(decoder, Decoder)
    decoder.tap((3,))
    harness = PagedHarness(decoder)
    tokens = TOKENS[0]
    batch = harness.batch([(Sequence(tokens.tolist()), len(tokens))])
    logits, states = tapped(decoder, harness, batch)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0]
        found = model.lm_head(model.model.norm(states))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected[-1:], rtol=1e-4, atol=1e-4)
    assert (states - model.model.norm(states)).abs().max() > 0.1


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("family", ["llama3", "qwen3-moe", "gpt-oss", "falcon-7b", "qwen3.5"])
def test_recorded_taps_are_those_of_functions(family, tmp_path):
    case = {**native.NATIVE, **native.HYBRID}[family]()
    case.save_pretrained(tmp_path)
    spec = widened(load_config(tmp_path).spec)
    exact, decoder = decoder_of(spec, "naive", torch.float32), decoder_of(spec, "native")
    plain = PagedHarness(decoder, block_size=16)
    with torch.inference_mode():
        expected = [decoder.forward(batch, plain.caches).clone() for batch in batches(plain)]
    taps = (0, 2, len(spec.layers))
    exact.tap(taps)
    decoder.tap(taps)
    judge, eager, recorded = (
        PagedHarness(model, block_size=16) for model in (exact, decoder, decoder)
    )
    assert decoder.record(recorded.caches, max_tokens=64, max_logits=64) == 64
    steps = zip(batches(judge), batches(eager), batches(recorded), expected, strict=True)
    for of_judge, of_eager, of_recorded, without in steps:
        _, right = tapped(exact, judge, of_judge)
        logits, ours = tapped(decoder, eager, of_eager)
        recorded_logits, theirs = tapped(decoder, recorded, of_recorded)
        assert torch.equal(logits, without)  # taps change nothing
        assert torch.equal(recorded_logits.bfloat16().float(), without)
        num_rows = int(of_eager.query_start_loc[-1])  # others are padding
        assert torch.equal(ours[:num_rows], theirs[:num_rows])
        if family in ("llama3", "falcon-7b"):  # else a token may choose other experts
            error = (ours - right)[:num_rows].abs().max()
            assert error < 0.03 * right.abs().max()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_likeliest_tokens_come_with_the_states(tmp_path):
    """Of a step that was recorded."""
    case = native.NATIVE["llama3"]()
    case.save_pretrained(tmp_path)
    spec = widened(load_config(tmp_path).spec)
    eager, recorded = decoder_of(spec, "native"), decoder_of(spec, "native")
    harnesses = [PagedHarness(model, block_size=16) for model in (eager, recorded)]
    for model in (eager, recorded):
        model.tap(TAPS)
    assert recorded.record(harnesses[1].caches, max_tokens=64, max_logits=64) == 64
    num_found = 0
    for batch, same in zip(*(batches(harness) for harness in harnesses), strict=True):
        logits, states = tapped(eager, harnesses[0], batch)
        assert eager.greedy_with_all_states(batch, harnesses[0].caches) is None
        with torch.inference_mode():
            found = recorded.greedy_with_all_states(same, harnesses[1].caches)
        if found is None:
            tapped(recorded, harnesses[1], same)
            assert len(same.input_ids) > 64
            continue
        num_found += 1
        assert torch.equal(found[0], logits.argmax(-1))
        num_rows = int(batch.query_start_loc[-1])
        assert torch.equal(found[1][:num_rows], states[:num_rows])
    assert num_found > 1


def test_layers_that_there_are_not_are_refused():
    decoder = decoder_of(widened(_plain()), "naive")
    for taps in ((0, 4), (-1,)):
        with pytest.raises(ValueError, match=r"must be between 0 and 3, the number of layers"):
            decoder.tap(taps)


def test_a_thin_copy_gives_as_many():
    decoder = decoder_of(widened(_plain()), "naive")
    decoder.tap((1, 2))
    thin = decoder.one_of_each_layer()
    harness = PagedHarness(decoder)
    batch = harness.batch([(Sequence([1, 2, 3]), 3)])
    _, states = tapped(thin, harness, batch)
    assert states.shape == (3, 2 * decoder.spec.hidden_size)


def _plain() -> DecoderSpec:
    values = native.config_values("llama2")
    return FAMILIES["LlamaForCausalLM"].spec(HfConfig(values))
