"""What a step's requests ask of their logits, on the device: edits, draws, logprobs, copies back.

The rules are those of `streamserve.runner.sampler`; `streamserve_kernels.sampling` has the contract
of the kernels. A penalty's history is a row of a table on the device, since the host does not know
the last token when the next is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamserve.core.plan import (
    Masks,
    NewRequest,
    TokenLogprobs,
    mask_of,
)
from streamserve.runner.bad_words import outputs_before
from streamserve.runner.cuda.arena import torch_dtype
from streamserve.runner.cuda.bad_words import DeviceBadWords
from streamserve.runner.cuda.input_batch import DeviceInputBatch, DeviceStep
from streamserve.runner.logits_edits import LogitsEdits, joint_mask
from streamserve.runner.pooling import Pooled
from streamserve.runner.prompt_logprobs import FoundLogprobs
from streamserve_kernels.sampling import (
    LogitsEditTensors,
    SamplingKernels,
    SamplingTensors,
    pack_mask,
    set_tokens,
)

_NUM_RESULTS = 4  # buffers: more than steps in flight
_FIRST_COUNT_ROWS = 16
_MOST_LOGPROBS = 20  # of OpenAI's API: always so many, since each number is a kernel of its own


@dataclass(frozen=True, slots=True)
class Drawn:
    """Results on their way to the host; to be read once the device has come past their copy."""

    _token_ids: Tensor  # [L] int64
    _logprobs: tuple[Tensor, Tensor, Tensor] | None  # chosen [L], top ids [L, k], top [L, k]
    _num_logprobs: NDArray[np.int64]  # [sampled]; -1: none wanted

    def token_ids(self, logits_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids of the sampled rows, in the plan's order."""
        ids: NDArray[np.int64] = self._token_ids.numpy()[logits_rows]
        return ids

    def logprobs(
        self, logits_rows: NDArray[np.int64], kept: slice | NDArray[np.int64]
    ) -> list[list[TokenLogprobs]] | None:
        """Of those of the sampled rows that are ``kept``: an entry for each, empty where not asked
        for; None if nobody asked.
        """
        if self._logprobs is None:
            return None
        chosen, top_ids, top = (part.numpy() for part in self._logprobs)
        found: list[list[TokenLogprobs]] = []
        rows, counts = logits_rows[kept], self._num_logprobs[kept].tolist()
        ids = self.token_ids(rows).tolist()
        for row, token_id, count in zip(rows.tolist(), ids, counts, strict=True):
            if count < 0:
                found.append([])
                continue
            best = zip(top_ids[row, :count].tolist(), top[row, :count].tolist(), strict=True)
            found.append([TokenLogprobs(token_id, float(chosen[row]), tuple(best))])
        return found


class DeviceSampler:
    """Samples on the device. One thread, the device thread."""

    def __init__(
        self, kernels: SamplingKernels, vocab_size: int, max_rows: int, device: torch.device
    ) -> None:
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._device = device
        self._pins = device.type == "cuda"
        self._max_rows = 2 * max_rows  # of live requests: see `DeviceInputBatch`
        self._results = [self._pinned((max_rows,), torch.int64) for _ in range(_NUM_RESULTS)]
        self._turn = 0
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._nothing = torch.zeros((1, 1), dtype=torch.int32, device=device)
        self._bad_words: dict[int, DeviceBadWords] = {}  # by row; old ones stay until replaced
        self.count_rows: dict[int, int] = {}
        """Rows of the penalties' table, by the row of a request that has one."""

    def begin_history(self, row: int, request: NewRequest, edits: LogitsEdits) -> None:
        """Begins the history of a new request in ``row``: its prompt, and what it had generated."""
        if request.sampling_params.has_penalties:
            self._count_history(row, request)
        words = edits.bad_sequences
        if words:
            recent, bias = outputs_before(request, words), request.sampling_params.logit_bias
            self._bad_words[row] = DeviceBadWords(words, recent, bias, self._device)

    def _count_history(self, row: int, request: NewRequest) -> None:
        if row not in self.count_rows:
            self.count_rows[row] = len(self.count_rows)
            self._reserve(len(self.count_rows))
        ids = torch.tensor(request.token_ids, dtype=torch.int64)
        num_prompt = request.num_prompt_tokens
        set_tokens(self._counts, self.count_rows[row], ids[:num_prompt], ids[num_prompt:])

    def sample(
        self,
        logits: Tensor,
        step: DeviceStep,
        batch: DeviceInputBatch,
        masks: Masks | None,
    ) -> Tensor:
        """Ids ``[L]`` int64 of all rows with logits; those of nobody are the arg-max."""
        inputs = step.inputs
        edits = self._edits(step, batch, masks)
        ids = self._kernels.sample(
            logits,
            SamplingTensors(
                temperature=inputs.temperature,
                top_k=inputs.top_k,
                top_p=inputs.top_p,
                min_p=inputs.min_p,
                uniforms=inputs.uniforms,
            ),
            edits,
        )
        if edits is not None and len(self._counts):
            self._kernels.add_tokens(self._counts, edits.rows, ids, edits.drafts, edits.num_before)
        for at, words in self._bad_words_of(step, batch).items():
            words.take(ids[at : at + 1])
        return ids

    def fetch(
        self, logits: Tensor, token_ids: Tensor, step: DeviceStep, batch: DeviceInputBatch
    ) -> Drawn:
        """Queues the copies of a step's ids, and of the logprobs that somebody asked for."""
        self._turn = (self._turn + 1) % _NUM_RESULTS
        on_host = self._results[self._turn][: len(token_ids)]
        on_host.copy_(token_ids, non_blocking=True)
        wanted = batch.rows.num_logprobs[step.rows.rows]
        if (wanted < 0).all():
            return Drawn(on_host, None, wanted)
        parts = self._kernels.logprobs(logits, token_ids, max(_MOST_LOGPROBS, int(wanted.max())))
        chosen, top_ids, top = (self._to_host(part) for part in parts)
        return Drawn(on_host, (chosen, top_ids, top), wanted)

    def fetch_prompts(self, found: FoundLogprobs) -> FoundLogprobs:
        """Queues the copies of a step's logprobs of prompts."""
        return FoundLogprobs(found.rows, *(self._to_host(part) for part in found.tensors()))

    def fetch_pooled(self, vectors: Mapping[str, Tensor]) -> Pooled:
        """Queues the copies of a step's vectors of prompts."""
        return Pooled({request_id: self._to_host(v) for request_id, v in vectors.items()})

    def _bad_words_of(self, step: DeviceStep, batch: DeviceInputBatch) -> dict[int, DeviceBadWords]:
        """By place among the rows with logits, rising."""
        if not self._bad_words:
            return {}
        places = sorted(zip(step.logits_rows.tolist(), step.rows.rows.tolist(), strict=True))
        return {
            at: self._bad_words[row]
            for at, row in places
            if row in batch.edits and batch.edits[row].bad_sequences
        }

    def _edits(
        self, step: DeviceStep, batch: DeviceInputBatch, masks: Masks | None
    ) -> LogitsEditTensors | None:
        rows = step.rows
        by_place = {
            int(at): batch.edits[row]
            for at, row in zip(step.logits_rows, rows.rows.tolist(), strict=True)
            if row in batch.edits
        }
        if not by_place and not masks:
            return None
        inputs = step.inputs
        count = len(inputs.temperature)
        positions = dict(
            zip(step.logits_rows.tolist(), rows.output_positions.tolist(), strict=True)
        )
        added = {at: edits.added(positions[at]) for at, edits in by_place.items()}
        bad_words = self._bad_words_of(step, batch)
        for at, words in bad_words.items():
            ids, values = added[at]
            # The device knows these values.
            added[at] = (
                np.concatenate((ids, np.array(words.last_ids))),
                np.concatenate((values, np.zeros(len(words.last_ids), dtype=np.float32))),
            )
        lengths = np.zeros(count + 1, dtype=np.int32)
        for at, (ids, _) in added.items():
            lengths[at + 1] = len(ids)
        in_order = [added[at] for at in sorted(added)]
        starts = lengths.cumsum(dtype=np.int32)
        bias_start, bias_ids, bias_values, mask_rows, mask_words = self._to_device(
            starts,
            _joined([ids for ids, _ in in_order], np.int32),
            _joined([values for _, values in in_order], np.float32),
            *self._masks(step, batch, masks, count),
        )
        for at, words in bad_words.items():
            end = int(starts[at + 1])
            bias_values[end - len(words.last_ids) : end] = words.values()
        return LogitsEditTensors(
            rows=inputs.count_rows,
            counts=self._counts if len(self._counts) else self._nothing,
            repetition=inputs.repetition_penalty,
            presence=inputs.presence_penalty,
            frequency=inputs.frequency_penalty,
            bias_start=bias_start,
            bias_ids=bias_ids,
            bias_values=bias_values,
            mask_rows=mask_rows,
            masks=mask_words if mask_words.numel() else self._nothing,
            drafts=None if rows.drafts is None else inputs.drafts,
            num_before=None if rows.drafts is None else inputs.num_before,
        )

    def _masks(
        self,
        step: DeviceStep,
        batch: DeviceInputBatch,
        masks: Masks | None,
        count: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Each row's row of masks, and the masks: a grammar's, and where all is not allowed."""
        rows = np.full(count, -1, dtype=np.int32)
        packed: list[NDArray[np.int32]] = []
        places = zip(step.logits_rows.tolist(), step.rows.rows.tolist(), strict=True)
        for i, (at, row) in enumerate(places):
            request_id, index = step.rows.request_ids[i], step.rows.index_of(i)
            grammar_mask = mask_of(masks, request_id, index) if masks else None
            if (mask := joint_mask(grammar_mask, batch.edits.get(row))) is not None:
                rows[at] = len(packed)
                packed.append(pack_mask(mask, self._vocab_size).numpy())
        return rows, np.stack(packed) if packed else np.zeros((0, 1), dtype=np.int32)

    def _reserve(self, num_rows: int) -> None:
        old = self._counts
        if num_rows > len(old):
            size = min(max(_FIRST_COUNT_ROWS, 2 * len(old)), self._max_rows)
            self._counts = old.new_zeros((size, self._vocab_size))
            self._counts[: len(old)] = old

    def _pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pins)

    def _to_host(self, values: Tensor) -> Tensor:
        on_host = self._pinned(tuple(values.shape), values.dtype)
        on_host.copy_(values, non_blocking=True)
        return on_host

    def _to_device(self, *arrays: NDArray[np.generic]) -> list[Tensor]:
        """One copy for all of them, each at 16 bytes: kernels are compiled for that."""
        sizes = [-(-array.nbytes // 16) * 16 for array in arrays]
        ends = list(accumulate(sizes))
        on_host = self._pinned((ends[-1],), torch.uint8)
        raw = on_host.numpy()
        places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        for array, place in zip(arrays, places, strict=True):
            raw[place][: array.nbytes] = array.reshape(-1).view(np.uint8)
        on_device = on_host.to(self._device, non_blocking=True)
        return [
            on_device[place][: array.nbytes].view(torch_dtype(array.dtype)).view(array.shape)
            for array, place in zip(arrays, places, strict=True)
        ]


def _joined(parts: list[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray[np.generic]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)
