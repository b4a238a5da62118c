"""A decoder that guesses: what the draft heads have in common."""

from __future__ import annotations

from torch import Tensor

from streamserve.models.batch import ForwardBatch, KVCache
from streamserve.models.decoder import Decoder


class HeadDecoder(Decoder):
    """Its batches have hidden states, and what it finds is for itself: see `DraftHead`."""

    def _guess(self, batch: ForwardBatch, kv_caches: KVCache) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest of its own tokens [L], and the final hidden states [L, H], normed and not.

        None of them is overwritten later.
        """
        recorded = self._recorded_for(batch, kv_caches)
        if recorded is not None:
            token_ids = recorded.greedy(batch)
            num_rows = token_ids.shape[0]
            [found] = recorded.tapped(num_rows)
            return token_ids.clone(), recorded.hidden_states(num_rows).clone(), found.clone()
        normed, found, _ = self._run(batch, kv_caches, ())
        return self._head(normed).argmax(-1), normed, found
