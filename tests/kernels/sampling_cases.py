"""What both sampling backends are tried with, and what the runner's sampler makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.sampler import Sampler
from streamserve_kernels import naive_sampling
from streamserve_kernels.sampling import (
    LogitsEditTensors,
    SamplingKernels,
    SamplingTensors,
    pack_mask,
    set_tokens,
)
from tests.runner.helpers import batch_of

ROUNDING = 1e-6  # of a CDF whose sums are taken in another order

PLAIN = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.0, min_p=0.01),
)
RESTRICTED = (
    SamplingParams(top_k=1),
    SamplingParams(top_k=7, min_p=0.5),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
    SamplingParams(temperature=1.3, top_k=300, top_p=0.5, min_p=0.002),
    SamplingParams(top_p=0.1),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=0.7, top_p=0.9999),
    SamplingParams(top_p=1e-9),
    SamplingParams(top_k=900),
)
EDITED = (
    SamplingParams(temperature=0.0, repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.7, frequency_penalty=0.4),
    SamplingParams(presence_penalty=-1.5, top_k=20),
    SamplingParams(temperature=0.9, repetition_penalty=1.1, top_p=0.8, min_p=0.01),
    SamplingParams(temperature=0.0, logit_bias={3: 100.0, 4: 99.0}, min_tokens=5),
    SamplingParams(logit_bias={i: i / 20.0 for i in range(0, 1000, 10)}, top_p=0.7),
    SamplingParams(logit_bias={7: 50.0, 9: 50.0, 500: 50.0, 501: 49.5}, min_tokens=1),
    SamplingParams(),
)


@dataclass
class Case:
    """L rows [L, V] and what each asks for."""

    logits: Tensor
    params: Sequence[SamplingParams]
    draws: Sequence[float]
    histories: Mapping[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    masks: Mapping[int, bytes] = field(default_factory=dict)
    eos: Sequence[int] = ()
    drafts: Mapping[int, list[int]] = field(default_factory=dict)  # those of the rows before

    def expected(self) -> Tensor:
        """The ids that the runner's sampler draws."""
        rows, vocab_size = self.logits.shape
        batch = batch_of(
            self.params,
            vocab_size,
            draws=self.draws,
            histories=self.histories,
            masks=self.masks,
            eos=self.eos,
        )
        batch = replace(batch, drafts=dict(self.drafts))
        return torch.from_numpy(
            Sampler(vocab_size, rows).sample(self.logits.float().numpy(), batch)
        )

    def tensors(self, device: torch.device | str = "cpu") -> SamplingTensors:
        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return SamplingTensors(
            tensor([p.temperature for p in self.params], torch.float32),
            tensor([p.top_k for p in self.params], torch.int32),
            tensor([p.top_p for p in self.params], torch.float64),
            tensor([p.min_p for p in self.params], torch.float32),
            tensor(self.draws, torch.float64),
        )

    def edits(self, device: torch.device | str = "cpu") -> LogitsEditTensors:
        rows, vocab_size = self.logits.shape
        edits_rows = torch.full((rows,), -1, dtype=torch.int32)
        counts = torch.full((max(rows, 1), vocab_size), 123, dtype=torch.int32)
        starts, ids, values = [0], [], []
        for row, p in enumerate(self.params):
            if p.has_penalties:
                edits_rows[row] = rows - 1 - row
                prompt, output = self.histories.get(row, ([1], []))
                set_tokens(counts, rows - 1 - row, torch.tensor(prompt), torch.tensor(output))
            banned = set(self.eos) | set(p.stop_token_ids) if p.min_tokens > 0 else set()
            ids += [*p.logit_bias, *banned]
            values += [*p.logit_bias.values(), *[-np.inf] * len(banned)]
            starts.append(len(ids))
        mask_rows = torch.full((rows,), -1, dtype=torch.int32)
        masks = torch.zeros(max(len(self.masks), 1), -(-vocab_size // 32), dtype=torch.int32)
        for i, (row, mask) in enumerate(self.masks.items()):
            mask_rows[row] = i
            masks[i] = pack_mask(mask, vocab_size)
        edits = LogitsEditTensors(
            edits_rows,
            counts,
            torch.tensor([p.repetition_penalty for p in self.params]),
            torch.tensor([p.presence_penalty for p in self.params]),
            torch.tensor([p.frequency_penalty for p in self.params]),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(ids, dtype=torch.int32),
            torch.tensor(values, dtype=torch.float32),
            mask_rows,
            masks,
            *self._drafts(),
        )
        return LogitsEditTensors(*(None if part is None else part.to(device) for part in edits))

    def _drafts(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.drafts:
            return None, None
        drafts = torch.full((len(self.params),), -1, dtype=torch.int32)
        num_before = torch.zeros_like(drafts)
        for row, before in self.drafts.items():
            num_before[row] = len(before)
            drafts[row - len(before) : row] = torch.tensor(before)
        return drafts, num_before


def check(
    kernels: SamplingKernels, case: Case, device: torch.device | str, *, edits: bool
) -> Tensor:
    """The ids [L] are those of the runner's sampler, or the uniform stands on the edge between."""
    logits = case.logits.to(device)
    before = logits.clone()
    ids = kernels.sample(logits, case.tensors(device), case.edits(device) if edits else None)
    assert ids.dtype == torch.int64
    assert torch.equal(logits.nan_to_num(1e9), before.nan_to_num(1e9))
    ids, expected = ids.cpu(), case.expected()
    for row in (ids != expected).nonzero()[:, 0].tolist():
        found = (int(ids[row]), int(expected[row]))
        assert _stands_on_an_edge(case, row, found), f"row {row}: {found[0]}, not {found[1]}"
    return ids


def _stands_on_an_edge(case: Case, row: int, ids: tuple[int, int]) -> bool:
    """Whether both ids' shares of the CDF touch the uniform, within the rounding of sums."""
    tensors = SamplingTensors(*(t[row : row + 1] for t in case.tensors()))
    values = naive_sampling.edited(case.logits, case.edits())[row : row + 1]
    draw = case.draws[row]
    for nudge in (0.0, -ROUNDING, ROUNDING):  # the set may end one token earlier or later
        weights = naive_sampling.truncated_weights(
            values, tensors._replace(top_p=tensors.top_p * (1 + nudge))
        )[0].double()
        after = weights.cumsum(0) / weights.sum()
        before = after - weights / weights.sum()
        if all(before[i] - ROUNDING <= draw <= after[i] + ROUNDING for i in ids):
            return True
    return False


def random_rows(rows: int, vocab_size: int, *, seed: int, scale: float = 4.0) -> Tensor:
    """Normal logits, rounded as a model's are: neighbours stay apart in every exponential."""
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, vocab_size, generator=random)).bfloat16().float()


def uniforms(count: int, *, seed: int) -> list[float]:
    found: list[float] = np.random.default_rng(seed).random(count).tolist()
    return found


def plain_case(vocab_size: int, seed: int, *, scale: float = 4.0) -> Case:
    params = PLAIN + RESTRICTED
    logits = random_rows(len(params), vocab_size, seed=seed, scale=scale)
    return Case(logits, params, uniforms(len(params), seed=seed))


def tied_case(vocab_size: int, seed: int) -> Case:
    """Few distinct logits: every threshold falls among equals."""
    params = PLAIN + RESTRICTED
    logits = random_rows(len(params), vocab_size, seed=seed, scale=1.5).round()
    return Case(logits, params, uniforms(len(params), seed=seed))


def edited_case(vocab_size: int, seed: int) -> Case:
    random = np.random.default_rng(seed)
    history = {
        row: (
            random.integers(0, vocab_size, 30).tolist(),
            [*random.integers(0, 50, 40).tolist(), vocab_size + 3],
        )
        for row in range(len(EDITED))
    }
    masks = {
        1: random.bytes(-(-vocab_size // 8)),
        3: random.bytes(vocab_size // 16),  # what lies past its end is forbidden
        7: random.bytes(-(-vocab_size // 8)),
    }
    logits = random_rows(len(EDITED), vocab_size, seed=seed)
    logits[:, 3] = logits.amax() + 1
    draws = uniforms(len(EDITED), seed=seed)
    return Case(logits, EDITED, draws, history, masks, eos=(3, 7, vocab_size - 1))


def drafted_case(vocab_size: int, seed: int) -> Case:
    """Requests of one row and of several; the third one's edits do not read its drafts."""
    random = np.random.default_rng(seed)
    kinds = ((EDITED[1], 1), (EDITED[0], 5), (EDITED[5], 2), (EDITED[3], 4))
    params, history, drafts = [], {}, {}
    for kind, count in kinds:
        first, seen = len(params), random.integers(0, vocab_size, 30).tolist()
        guesses = [int(seen[0]), 7, 7, vocab_size - 1][: count - 1]
        for place in range(count):
            drafts[first + place] = guesses[:place]
            history[first + place] = seen, [*seen[:5], 9]
            params.append(kind)
    logits = random_rows(len(params), vocab_size, seed=seed, scale=1.0)
    logits[:, [7, vocab_size - 1]] = logits.amax() + 1  # the drafts decide which of them it is
    return Case(logits, params, uniforms(len(params), seed=seed), history, drafts=drafts)


def drafted_counts(vocab_size: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Arguments of `add_tokens`: requests with four rows, one, three and two of another row; then
    the counts that there should be.
    """
    ids = torch.tensor([4, 5, 6, 7, 8, 9, 9, 9, vocab_size, 3])
    drafts = torch.tensor([4, 5, 0, -1, -1, 9, 9, -1, vocab_size - 1, -1], dtype=torch.int32)
    num_before = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 0, 1], dtype=torch.int32)
    rows = torch.tensor([2, 2, 2, 2, -1, 0, 0, 0, 1, 1], dtype=torch.int32)
    counts, expected = (torch.zeros(3, vocab_size, dtype=torch.int32) for _ in range(2))
    expected[2, [4, 5, 6]] = 1
    expected[0, 9] = 3
    given = (counts, rows, ids, drafts, num_before)
    return (*(part.to(device, copy=True) for part in given), expected)


def bad_case(vocab_size: int, seed: int) -> Case:
    """Rows with NaN and infinities, and rows in which a mask or a ban leaves nothing."""
    params = (
        [SamplingParams(temperature=t) for t in (0.0, 1.0)] * 4
        + [SamplingParams(top_p=0.6), SamplingParams(top_k=2)] * 2
        + [SamplingParams(top_p=0.6), SamplingParams(temperature=0.0)]
    )
    logits = random_rows(len(params), vocab_size, seed=seed)
    nan, inf = float("nan"), float("inf")
    logits[0:2, 5::7] = nan
    logits[2:4] = nan
    logits[4:6] = -inf
    logits[6:8, [9, 300, vocab_size - 1]] = inf
    logits[7, ::3] = nan
    logits[8, [9, 300, vocab_size - 1]] = inf
    logits[9, 20:] = -inf
    logits[10] = -inf
    logits[10, 77] = -30.0
    logits[11, 100:] = nan
    masks = {12: bytes(1), 13: bytes(1)}
    return Case(logits, params, uniforms(len(params), seed=seed), masks=masks)


@st.composite
def ragged_cases(draw: st.DrawFn, vocab_sizes: Sequence[int], max_rows: int) -> Case:
    """Rows of one vocabulary, from one sure token to many equals, asking for anything at all."""
    vocab_size = draw(st.sampled_from(vocab_sizes))
    seed = draw(st.integers(0, 2**20))
    params = draw(
        st.lists(
            st.builds(
                SamplingParams,
                temperature=st.sampled_from([0.0, 0.2, 1.0, 2.0]),
                top_k=st.sampled_from([0, 0, 1, 5, 64, vocab_size - 1, vocab_size]),
                top_p=st.sampled_from([1.0, 1.0, 0.95, 0.6, 0.01]),
                min_p=st.sampled_from([0.0, 0.0, 0.001, 0.3, 1.0]),
            ),
            min_size=1,
            max_size=max_rows,
        )
    )
    scale = draw(st.sampled_from([0.01, 1.0, 3.0, 30.0]))
    logits = random_rows(len(params), vocab_size, seed=seed, scale=scale)
    if draw(st.booleans()):
        logits = logits.round()
    return Case(logits, params, uniforms(len(params), seed=seed))
