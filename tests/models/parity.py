"""What every model must do in a paged cache, compared with another model of the same weights."""

from __future__ import annotations

import torch

from streamserve.models import LanguageModel
from tests.models.paged import PagedHarness, Sequence

NUM_GREEDY = 32
# Of states, the judge adds up the tokens of a text in another order, and rounds otherwise.
STATES_TOLERANCE = 5e-4


def prompts(shared: int) -> list[list[int]]:
    """Ragged prompts, the first ``shared`` tokens of all but one in common."""
    generator = torch.Generator().manual_seed(11)
    lengths = (21, 13, 34, 1, 18)
    tokens = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]
    return [own if i == 3 else tokens[2][:shared] + own[shared:] for i, own in enumerate(tokens)]


def assert_equals_judge(
    judge: torch.nn.Module,
    decoder: LanguageModel,
    *,
    chunk: int | None,
    prefix_hit: bool,
    tolerance: float = 1e-4,
) -> None:
    """A forward of the judge over prompt and answer checks each token that was drawn.

    If every answer token is the argmax that it has after what stands before it, its own greedy
    generation is the same answer, by induction over the tokens.
    """
    harness = PagedHarness(decoder)
    sequences = [Sequence(tokens) for tokens in prompts(shared=10)]
    skipped = [0] * len(sequences)
    if prefix_hit:
        harness.prefill(sequences[:1], chunk)
        for index, sequence in enumerate(sequences[1:], start=1):
            harness.share_prefix(sequence, sequences[0])
            skipped[index] = sequence.num_computed
        assert skipped == [0, 8, 8, 0, 8]
        # The first one is a full hit: all but its last token come from the cache.
        again = Sequence(sequences[0].tokens)
        harness.share_prefix(again, sequences[0])
        sequences[0], skipped[0] = again, again.num_computed
    prefill_logits = harness.prefill(sequences, chunk)
    lengths = [len(sequence.tokens) for sequence in sequences]
    last = torch.stack([logits[-1] for logits in prefill_logits])
    decode_logits = harness.decode(sequences, last, NUM_GREEDY)

    for index, sequence in enumerate(sequences):
        with torch.inference_mode():
            expected = judge(torch.tensor([sequence.tokens])).logits[0]
        ours = torch.cat((prefill_logits[index], decode_logits[index, 1:]))
        torch.testing.assert_close(
            ours, expected[skipped[index] : -1], rtol=tolerance, atol=tolerance
        )
        drawn = expected[lengths[index] - 1 : -1].argmax(-1).tolist()
        assert sequence.tokens[lengths[index] :] == drawn


def assert_unasked_rows_change_nothing(decoder: LanguageModel) -> None:
    """Only the last rows' logits, none at all, and padding: each equals the full computation."""
    tokens = prompts(shared=0)
    everything = PagedHarness(decoder).prefill([Sequence(t) for t in tokens], None)

    harness = PagedHarness(decoder)
    sequences = [Sequence(t) for t in tokens]
    work = [(sequence, len(sequence.tokens)) for sequence in sequences]
    logits = harness.step(work, padding=3)
    assert logits.dtype == torch.float32
    expected = torch.stack([rows[-1] for rows in everything])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    harness = PagedHarness(decoder)
    sequence = Sequence(tokens[0])
    assert harness.step([(sequence, 9)]).shape == (0, 97)
    logits = harness.step([(sequence, len(tokens[0]) - 9)], all_rows=True)
    torch.testing.assert_close(logits, everything[0][9:], rtol=3e-5, atol=3e-5)
