"""What sampling on the device is given: tensors of one step, all on the device of its logits.

A sampling backend is a module with these functions; the meaning is `streamserve.runner.sampler`'s
(penalties, bias, bans, grammar mask, temperature, min-p, top-k, top-p, inverse CDF in id order):

    greedy(logits) -> ids                           the lowest id among equals; NaN counts as -inf
    sample(logits, tensors, edits=None) -> ids      see SamplingTensors, LogitsEditTensors
    logprobs(logits, ids, k) -> Logprobs            of the raw logits
    add_tokens(counts, rows, ids, …)                after a step: what it sampled

`logits` are [L, V] float32, bfloat16 or float16 with rows at any stride; nothing changes them. Ids
are int64 [L]. No function reads device data on the host, and everything that is launched follows
from shapes: a step can be captured into a CUDA graph. A row's result does not depend on others.

L rows to be sampled, V vocabulary, C rows of counts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from streamserve_kernels.uploads import upload

MIN_TEMPERATURE = 1e-5  # below it a row is greedy
MIN_LOGPROB = -9999.0  # stands for minus infinity
IN_PROMPT = 1 << 30  # this bit of a count; the lower ones count what was generated


class SamplingTensors(NamedTuple):
    """What L rows ask for."""

    temperature: Tensor  # [L] float32, 0: greedy
    top_k: Tensor  # [L] int32, 0: no limit
    top_p: Tensor  # [L] float64 (float32 is taken too), in (0, 1]
    min_p: Tensor  # [L] float32
    uniforms: Tensor  # [L] float64 (float32 is taken too), in [0, 1)


class LogitsEditTensors(NamedTuple):
    """What L rows change in their logits first. Rows that change nothing have -1, 1, 0, no bias.

    With `drafts` a row counts those of the `num_before` rows right before it as generated, too.

    A banned token is one more bias of -inf; it may come beside another bias of the same id, but two
    finite ones of one id may not. Where no row has penalties `counts` may be any [1, 1], and so may
    `masks` where no row has a mask.
    """

    rows: Tensor  # [L] int32: the row's row of counts, -1: no penalties
    counts: Tensor  # [C, V] int32: IN_PROMPT | how often the token was generated
    repetition: Tensor  # [L] float32, 1: none
    presence: Tensor  # [L] float32
    frequency: Tensor  # [L] float32
    bias_start: Tensor  # [L + 1] int32: where each row's biases start
    bias_ids: Tensor  # int32, below V
    bias_values: Tensor  # float32
    mask_rows: Tensor  # [L] int32: the row's row of masks, -1: everything is allowed
    masks: Tensor  # [n, ceil(V / 32)] int32: a bit per token, lowest first, 1: allowed
    drafts: Tensor | None = None  # [L] int32: a guess at what the row draws; None: no row has one
    num_before: Tensor | None = None  # [L] int32: rows right before whose drafts it follows


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, at least MIN_LOGPROB.

    Of two equally likely tokens the lower id comes first. Ids whose logprob is MIN_LOGPROB are in
    no particular order.
    """

    chosen: Tensor  # [L] float32
    top_ids: Tensor  # [L, k] int64
    top: Tensor  # [L, k] float32, falling


class SamplingKernels(Protocol):
    """The functions of a backend; `streamserve_kernels.naive_sampling` is the specification."""

    def greedy(self, logits: Tensor) -> Tensor: ...
    def sample(
        self, logits: Tensor, tensors: SamplingTensors, edits: LogitsEditTensors | None = None
    ) -> Tensor: ...
    def logprobs(self, logits: Tensor, ids: Tensor, k: int) -> Logprobs: ...
    def add_tokens(
        self,
        counts: Tensor,
        rows: Tensor,
        ids: Tensor,
        drafts: Tensor | None = None,
        num_before: Tensor | None = None,
    ) -> None:
        """`counts[rows[i], ids[i]] += 1` where `rows[i] >= 0`; ids outside the vocabulary do not
        count, nor does, with drafts, one behind a draft that was wrong: every one of the
        `num_before[i]` rows right before it must have drawn its own. rows [L] int32, ids [L] int64.
        """


def set_tokens(counts: Tensor, row: int, prompt_ids: Tensor, output_ids: Tensor) -> None:
    """Makes a row of counts that of a request which has these tokens; ids are int64 on the CPU.

    Ids outside the vocabulary do not count.
    """
    vocab_size = counts.shape[1]
    prompt = prompt_ids[(prompt_ids >= 0) & (prompt_ids < vocab_size)]
    output = output_ids[(output_ids >= 0) & (output_ids < vocab_size)]
    ids, places, occurrences = torch.unique(
        torch.cat((prompt, output)), return_inverse=True, return_counts=True
    )
    in_prompt = torch.zeros_like(ids)
    in_prompt.scatter_add_(0, places[: len(prompt)], torch.ones_like(prompt))
    values = occurrences - in_prompt + IN_PROMPT * (in_prompt > 0)
    mine = counts[row]
    mine.zero_()
    mine.index_copy_(0, upload(ids, counts.device), upload(values.to(counts.dtype), counts.device))


def pack_mask(mask: bytes, vocab_size: int) -> Tensor:
    """One row [ceil(V / 32)] of `LogitsEditTensors.masks`, on the CPU, from packed bits.

    The lowest bit comes first; tokens past the end of `mask` are forbidden.
    """
    size = -(-vocab_size // 32) * 4
    return torch.frombuffer(bytearray(mask[:size].ljust(size, b"\0")), dtype=torch.int32)
