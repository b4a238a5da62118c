"""A request's place in its grammar follows from its output ids alone."""

import pytest

from streamserve.core.plan import ScheduledRequest, SchedulerOutput
from streamserve.core.request import FinishReason, Request, RequestStatus
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.core.thinking import Thinking
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.grammar_masks import GrammarError, GrammarMasks, RequestMatcher
from tests.engine.fakes import EOS, patient_grammars

OUTPUT = StructuredOutput(kind=GrammarKind.REGEX, text="ab*c")


@pytest.fixture
async def matcher():
    grammars = patient_grammars(ByteTokenizer())
    await grammars.compile(OUTPUT)
    yield grammars.matcher(OUTPUT)
    grammars.close()


def no_masks() -> GrammarMasks:
    return GrammarMasks(ByteTokenizer().token_bytes, 258)


def request(output: bytes = b"", **params) -> Request:
    made = Request(
        "r",
        list(b"prompt"),
        SamplingParams(structured_output=OUTPUT, max_tokens=50, **params),
        arrival_time=0.0,
        seed=0,
        eos_token_ids=frozenset({EOS}),
    )
    made.token_ids.extend(output)
    return made


def allowed(mask: bytes) -> set[int]:
    return {i for i in range(258) if mask[i >> 3] >> (i & 7) & 1}


def plan(output_position: int, *, sample: bool = True, drafts: bytes = b"") -> SchedulerOutput:
    row = ScheduledRequest("r", 0, [1, *drafts], [], sample + len(drafts), output_position)
    return SchedulerOutput(0, scheduled=[row])


async def test_masks_follow_ids_that_came_one_by_one_or_together(matcher):
    one, late = request(), request(b"abb")
    masks, other = no_masks(), no_masks()
    masks.add(one, matcher.deep_copy())
    other.add(late, matcher.deep_copy())
    expected = [{97}, {98, 99}, {98, 99}, {98, 99}]
    for position, ids in enumerate(expected):
        assert masks.are_known(plan(position))
        assert not masks.are_known(plan(position + 1))
        filled, failed = masks.fill(plan(position))
        assert allowed(filled["r"]) == ids
        assert not failed
        one.token_ids.append(b"abb."[position])
    assert allowed(other.fill(plan(3))[0]["r"]) == {98, 99}


async def test_who_samples_nothing_or_has_ended_needs_no_mask(matcher):
    masks = no_masks()
    ended = request(b"a")
    masks.add(ended, matcher)
    assert masks.are_known(plan(9, sample=False))
    assert masks.fill(plan(1, sample=False)) == ({}, {})
    ended.status, ended.finish_reason = RequestStatus.FINISHED, FinishReason.STOP
    assert masks.are_known(plan(9))
    assert masks.fill(plan(9)) == ({}, {})
    masks.drop("r")
    assert not masks


async def test_ids_that_the_grammar_forbids_are_an_error(matcher):
    masks = no_masks()
    masks.add(request(b"ax"), matcher)
    filled, failed = masks.fill(plan(2))
    assert not filled
    assert isinstance(failed["r"], GrammarError)


async def test_stop_ids_may_come_where_the_answer_is_whole(matcher):
    whole = RequestMatcher(request(b"abc", stop_token_ids=(1, 98)), matcher.deep_copy())
    assert allowed(whole.mask()) == {1, 98, EOS}
    inside = RequestMatcher(request(b"ab", stop_token_ids=(1, 98)), matcher.deep_copy())
    assert allowed(inside.mask()) == {98, 99}


class SlowMatcher:
    """Takes a second of processor time for each mask, by its own account."""

    def compute_bitmask(self) -> bytes:
        return bytes(33)

    def is_error(self) -> bool:
        return False

    def is_accepting(self) -> bool:
        return False


def test_a_grammar_that_is_slow_for_long_is_an_error(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("streamserve.engine.grammar_masks.time.thread_time", lambda: next(clock))
    slow = RequestMatcher(request(), SlowMatcher())
    with pytest.raises(GrammarError, match="more than 10 ms"):
        slow.mask()


def fill_rows(masks: GrammarMasks, drafts: bytes) -> list[set[int] | None]:
    filled, failed = masks.fill(plan(0, drafts=drafts))
    assert not failed
    return [None if mask is None else allowed(mask) for mask in filled["r"]]


async def test_each_sample_behind_a_draft_has_a_mask(matcher):
    """What was drafted counts for nothing once it is known that something else came."""
    masks, one = no_masks(), request(b"a")
    masks.add(one, matcher.deep_copy())
    middle = {98, 99}
    assert fill_rows(masks, b"bbc") == [middle, middle, middle, {EOS}]
    assert fill_rows(masks, b"cb") == [middle, {EOS}, None]
    assert fill_rows(masks, b"xbb") == [middle, None, None, None]
    one.token_ids.extend(b"bb")
    assert fill_rows(masks, b"c") == [middle, {EOS}]
    one.token_ids.extend(b"c")
    assert allowed(masks.fill(plan(4))[0]["r"]) == {EOS}


def assert_masks_behind(new_masks, output: bytes, drafts: list[int], **params) -> None:
    """Of each sample, as they are where the drafts before it are known, and none of the others."""
    expected: list[bytes | None] = []
    for i in range(len(drafts) + 1):
        known = request(output, **params)
        known.token_ids.extend(drafts[:i])
        filled, _ = new_masks(known).fill(plan(known.num_output_tokens))
        expected.append(filled.get("r"))
        if i < len(drafts) and expected[-1] and drafts[i] not in allowed(expected[-1]):
            break
    expected += [None] * (len(drafts) + 1 - len(expected))
    one = request(output, **params)
    masks = new_masks(one)
    row = ScheduledRequest("r", 0, [97, *drafts], [], 1 + len(drafts), len(output))
    for _ in range(2):  # the first time leaves nothing behind
        filled, _ = masks.fill(SchedulerOutput(0, scheduled=[row]))
        assert filled["r"] == expected


@pytest.mark.parametrize("pattern", ["ab*c", "ab*"])
@pytest.mark.parametrize(
    "params", [{}, {"stop_token_ids": (1,)}, {"min_tokens": 4}, {"ignore_eos": True}]
)
async def test_drafts_across_the_end(pattern, params):
    """Behind an id that ends there are ends only, here as where there are no drafts."""
    grammars = patient_grammars(ByteTokenizer())
    output = StructuredOutput(kind=GrammarKind.REGEX, text=pattern)
    await grammars.compile(output)

    def new_masks(followed: Request) -> GrammarMasks:
        masks = no_masks()
        masks.add(followed, grammars.matcher(output))
        return masks

    for drafts in ([*b"bbbb"], [*b"bbc", EOS, EOS], [*b"bb", EOS, EOS], [*b"bbc", 1, EOS]):
        assert_masks_behind(new_masks, b"a", drafts, **params)
    grammars.close()


@pytest.mark.parametrize("next_token_ids", [(), tuple(b"!")])
@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("is_optional", [False, True])
async def test_drafts_across_the_end_of_thoughts(matcher, next_token_ids, budget, is_optional):
    thinking = Thinking(
        is_open=not is_optional,
        start_token_ids=(60,),
        end_token_ids=(62,),
        start=b"<",
        end=b">",
        next_token_ids=next_token_ids,
        budget=budget,
        is_optional=is_optional,
    )

    def new_masks(followed: Request) -> GrammarMasks:
        masks = no_masks()
        masks.add(followed, matcher)
        return masks

    start = b"<" if is_optional else b""
    behind = bytes(next_token_ids)
    for output, drafts in (
        (start + b"x", b"y>" + behind + b"abbc"),
        (start + b"xyz", b"u>" + behind + b"abx"),
        (start + b"xy>" + behind, b"abbc"),
        (b"", start + b"x>" + behind + b"ab"),
        (b"", b"abbc" if is_optional else b"x"),
    ):
        assert_masks_behind(new_masks, output, [*drafts], thinking=thinking)


async def test_what_must_follow():
    grammars = patient_grammars(ByteTokenizer())
    output = StructuredOutput(kind=GrammarKind.REGEX, text="abcd[ef]ghi")
    await grammars.compile(output)
    one = request()
    find = no_masks().add(one, grammars.matcher(output))
    assert [find(9), find(2)] == [[*b"abcd"], [*b"ab"]]
    one.token_ids.extend(b"abc")
    assert find(9) == [*b"d"]
    one.token_ids.extend(b"d")
    assert find(9) == []
    one.token_ids.extend(b"f")
    assert find(9) == [*b"ghi"]
    one.token_ids.extend(b"x")
    assert find(9) == []  # the mask says what is wrong
    grammars.close()
