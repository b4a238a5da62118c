"""Batches built by hand, and the sampler's meaning in as few lines as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from streamserve.core.plan import NewRequest
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.logits_edits import LogitsEdits
from streamserve.runner.philox import uniforms
from streamserve.runner.sampler import Sampler, SamplingBatch


def new_request(
    params: SamplingParams,
    *,
    request_id: str = "r",
    prompt: Sequence[int] = (1,),
    output: Sequence[int] = (),
    seed: int = 0,
    choice_index: int = 0,
    eos: Sequence[int] = (),
) -> NewRequest:
    return NewRequest(
        request_id,
        [*prompt, *output],
        len(prompt),
        params,
        seed,
        choice_index,
        frozenset(eos),
    )


def batch_of(
    params: Sequence[SamplingParams],
    vocab_size: int,
    *,
    draws: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    histories: Mapping[int, tuple[list[int], list[int]]] | None = None,
    masks: Mapping[int, bytes] | None = None,
    eos: Sequence[int] = (),
) -> SamplingBatch:
    count = len(params)
    output_positions = np.array(positions or [0] * count, dtype=np.int64)
    if draws is None:
        seed_array = np.array(seeds or range(count), dtype=np.int64)
        draw_array = uniforms(seed_array, np.zeros(count, dtype=np.int64), output_positions)
    else:
        draw_array = np.array(draws, dtype=np.float64)
    edits = {}
    for i, p in enumerate(params):
        prompt, output = (histories or {}).get(i, ([1], []))
        request = new_request(p, prompt=prompt, output=output, eos=eos)
        if LogitsEdits.are_needed(request):
            edits[i] = LogitsEdits(request, vocab_size)
    return SamplingBatch(
        temperature=np.array([p.temperature for p in params], dtype=np.float32),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float64),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        uniforms=draw_array,
        output_positions=output_positions,
        num_logprobs=np.array(
            [-1 if p.logprobs is None else p.logprobs for p in params], dtype=np.int64
        ),
        edits=edits,
        masks=dict(masks or {}),
    )


def reachable(sampler: Sampler, logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """How often each token of one row [V] comes when the uniform walks [0, 1) in small steps."""
    steps = 4096
    rows = 256
    counts = np.zeros(len(logits), dtype=np.int64)
    draws = (np.arange(steps) + 0.5) / steps
    for start in range(0, steps, rows):
        part = draws[start : start + rows]
        ids = sampler.sample(
            np.repeat(logits[None], len(part), axis=0),
            batch_of([params] * len(part), len(logits), draws=part),
        )
        counts += np.bincount(ids, minlength=len(logits))
    return counts / steps
