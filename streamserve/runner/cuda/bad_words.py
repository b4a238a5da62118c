"""Words that must not be completed, where only the device knows the last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamserve_kernels.uploads import upload

_ANY, _NONE = -1, -2  # stands for every token, and for no token


class DeviceBadWords:
    """One request's words, the end of what it has generated, and the biases that follow.

    ``last_ids`` are the D tokens that end a word; each gets its logit bias, or -inf where it would
    complete a word. Nothing here reads device data on the host.
    """

    def __init__(
        self,
        words: Sequence[tuple[int, ...]],
        recent: Sequence[int],
        logit_bias: Mapping[int, float],
        device: torch.device,
    ) -> None:
        """``recent`` is the end of the request's output so far."""
        reach = max(len(word) for word in words) - 1
        prefixes = [[_ANY] * (reach + 1 - len(word)) + list(word[:-1]) for word in words]
        self.last_ids = sorted({word[-1] for word in words})
        ends = [[word[-1] == last for word in words] for last in self.last_ids]
        padded = ([_NONE] * reach + list(recent))[-reach:]
        biases = [logit_bias.get(last, 0.0) for last in self.last_ids]
        self._prefixes = upload(torch.tensor(prefixes), device)  # [W, K]
        self._ends = upload(torch.tensor(ends), device)  # [D, W]
        self._recent = upload(torch.tensor(padded), device)  # [K]
        self._biases = upload(torch.tensor(biases, dtype=torch.float32), device)  # [D]

    def values(self) -> Tensor:
        """Biases ``[D]`` float32 of ``last_ids`` for the next token."""
        begun = ((self._prefixes == self._recent) | (self._prefixes == _ANY)).all(1)
        banned = (self._ends & begun).any(1)
        return self._biases.masked_fill(banned, -torch.inf)

    def take(self, token_id: Tensor) -> None:
        """Adds a sampled token, int64 ``[1]``."""
        self._recent = torch.cat((self._recent, token_id))[1:]
