"""The bar that shows how far a batch is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from streamserve.llm.outputs import EmbeddingRequestOutput, RequestOutput

_TITLE = "Processed prompts"

UseTqdm = bool | Callable[..., Any]


class Progress:
    """One tick for each prompt that is answered, with tokens per second beside it."""

    def __init__(self, use_tqdm: UseTqdm, total: int) -> None:
        self._bar = _new_bar(use_tqdm, total)
        self._started = time.monotonic()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    def answered(self, output: RequestOutput | EmbeddingRequestOutput) -> None:
        """A prompt has its answers, or its vector."""
        if self._bar is None:
            return
        self._num_prompt_tokens += len(output.prompt_token_ids)
        if isinstance(output, RequestOutput):
            self._num_output_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(
            f"tokens/s: {self._num_prompt_tokens / seconds:.0f} in, "
            f"{self._num_output_tokens / seconds:.0f} out",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _new_bar(use_tqdm: UseTqdm, total: int) -> Any:
    if not isinstance(use_tqdm, bool):
        return use_tqdm(total=total, desc=_TITLE, dynamic_ncols=True)
    if not use_tqdm:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=_TITLE, dynamic_ncols=True)
