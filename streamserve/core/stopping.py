"""Where an answer ends: integer checks on sampled ids. Stop strings are the engine's."""

from __future__ import annotations

from streamserve.core.request import FinishReason, Request


def append_tokens(
    request: Request, token_ids: list[int]
) -> tuple[list[int], FinishReason | None, int | None]:
    """Append sampled ids to the request, up to the one that ends it.

    Returns the ids that were appended, why it ended, and the stop id that ended it. EOS and stop
    ids count only behind ``min_tokens`` output tokens, which is where the sampler allows them, or a
    grammar that nothing can be added to. A request for which nothing was sampled has its vector;
    one of no tokens ends without the one that came of computing its prompt.
    """
    known, ending_ids = request.token_ids, request.ending_ids
    if len(token_ids) == 1 and token_ids[0] not in ending_ids:  # nearly every call
        known.append(token_ids[0])
        if len(known) < request.max_num_tokens:
            return token_ids, None, None
        if request.sampling_params.max_tokens != 0:
            return token_ids, FinishReason.LENGTH, None
        known.pop()
    if request.sampling_params.max_tokens == 0:
        return [], FinishReason.LENGTH, None
    for i, token_id in enumerate(token_ids):
        known.append(token_id)
        if token_id in ending_ids and (
            request.num_output_tokens > request.sampling_params.min_tokens
            or request.sampling_params.structured_output is not None
        ):
            is_eos = token_id in request.eos_token_ids and not request.sampling_params.ignore_eos
            return token_ids[: i + 1], FinishReason.STOP, None if is_eos else token_id
        if len(known) >= request.max_num_tokens:
            return token_ids[: i + 1], FinishReason.LENGTH, None
    return token_ids, None if token_ids else FinishReason.STOP, None
