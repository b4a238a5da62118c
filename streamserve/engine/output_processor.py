"""One request's way from token ids to what its reader sees."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason, Request
from streamserve.engine.detokenizer import IncrementalDetokenizer
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.stop import stop_checker
from streamserve.engine.tokenizer import Tokenizer


class OutputProcessor:
    """Detokenises, looks for stop strings, counts. Event-loop thread only.

    ``num_output_tokens`` counts what the reader has been given: end-of-sequence and stop tokens
    belong to it, tokens behind a stop string do not. Logprobs are those of the tokens whose text is
    shown, as in OpenAI's API: joined they are the text. ``is_plain``: there is nothing to look for
    or to give but text.
    """

    __slots__ = (
        "_add",
        "_finish",
        "_keep_stop_token",
        "_min_tokens",
        "_owes_prompts_own",
        "_request",
        "_stop",
        "is_plain",
        "num_output_tokens",
    )

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.sampling_params
        detokenizer = IncrementalDetokenizer(tokenizer, request.token_ids, params)
        self._add = detokenizer.add
        self._finish = detokenizer.finish
        self._stop = stop_checker(params)
        self._keep_stop_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._request = request
        self.num_output_tokens = 0
        self._owes_prompts_own = request.prompt_logprobs is not None or params.pooling is not None
        self.is_plain = self._stop is None and not self._owes_prompts_own

    @property
    def usage(self) -> Usage:
        """What the reader has been given so far."""
        request = self._request
        return Usage(request.num_prompt_tokens, self.num_output_tokens, request.num_cached_tokens)

    def text_of(self, token_ids: list[int]) -> str:
        """The text alone of a step that does not end the request; only if ``is_plain``."""
        self.num_output_tokens += len(token_ids)
        return self._add(token_ids)

    def output(self, text: str, token_ids: list[int]) -> RequestOutput:
        """The news of a step whose ``text_of`` was taken before."""
        return self._output(text, token_ids, [], None, None)

    def process(
        self,
        token_ids: list[int],
        logprobs: list[TokenLogprobs],
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> RequestOutput:
        """Return the news of one step.

        The output's ``finish_reason`` is ``STOP`` with a string as ``stop_reason`` if a stop
        string ended in these tokens; those behind it are then dropped.
        """
        if self._stop is not None:
            return self._process_with_stops(token_ids, logprobs, finish_reason, stop_reason)
        self.num_output_tokens += len(token_ids)
        if finish_reason is None:
            text = self._add(token_ids)
        else:
            shown_ids = self._shown_ids(token_ids, finish_reason)
            text = self._add(shown_ids) + self._rest()
            logprobs = logprobs[: len(shown_ids)]
        return self._output(text, token_ids, logprobs, finish_reason, stop_reason)

    def abort(self) -> RequestOutput:
        """Return the last output of a request that ends between two steps."""
        text = self._rest()
        if self._stop is not None:
            text = self._stop.add(text, may_stop=False)[0] + self._stop.flush()
        return self._output(text, [], [], FinishReason.ABORT, None)

    def _rest(self) -> str:
        """What the detokeniser holds back; of the prompt's own beginning of a character nothing."""
        return self._finish() if self.num_output_tokens else ""

    def _process_with_stops(
        self,
        token_ids: list[int],
        logprobs: list[TokenLogprobs],
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> RequestOutput:
        stop = self._stop
        assert stop is not None
        text = ""
        before = self.num_output_tokens
        shown_ids = self._shown_ids(token_ids, finish_reason)
        for n, token_id in enumerate(shown_ids, start=1):
            certain, matched = stop.add(
                self._add((token_id,)), may_stop=before + n > self._min_tokens
            )
            text += certain
            if matched is not None:
                self.num_output_tokens += n
                return self._output(
                    text,
                    token_ids[:n],
                    logprobs[:n],
                    FinishReason.STOP,
                    matched,
                )
        self.num_output_tokens += len(token_ids)
        if finish_reason is not None:
            may_stop = self.num_output_tokens > self._min_tokens
            certain, matched = stop.add(self._rest(), may_stop=may_stop)
            text += certain + stop.flush()
            if matched is not None:
                finish_reason, stop_reason = FinishReason.STOP, matched
        return self._output(text, token_ids, logprobs[: len(shown_ids)], finish_reason, stop_reason)

    def _shown_ids(self, token_ids: list[int], finish_reason: FinishReason | None) -> Sequence[int]:
        """Leave out the token that ended the request: end-of-sequence or a stop id (as vLLM)."""
        if finish_reason is FinishReason.STOP and not self._keep_stop_token:
            return token_ids[:-1]
        return token_ids

    def _output(
        self,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprobs],
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> RequestOutput:
        request = self._request
        usage = Usage(request.num_prompt_tokens, self.num_output_tokens, request.num_cached_tokens)
        output = RequestOutput(text, token_ids, usage, logprobs, finish_reason, stop_reason)
        if self._owes_prompts_own:
            self._owes_prompts_own = False
            output.prompt_logprobs = request.prompt_logprobs
            output.embedding = _checked(request.embedding)
        return output


def _checked(embedding: array[float] | None) -> array[float] | None:
    """Raise ``ValueError`` for what JSON cannot say and no distance can be taken of."""
    if embedding is not None and not math.isfinite(sum(embedding)):
        raise ValueError("the embedding holds numbers that are not finite")
    return embedding
