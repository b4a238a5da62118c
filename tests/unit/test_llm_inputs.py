"""What programs may write: sampling parameters, prompts and conversations in vLLM's forms."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from streamserve import SamplingParams
from streamserve.api.extras import Truncation
from streamserve.core.sampling_params import BeamSearchParams
from streamserve.core.sampling_params import SamplingParams as CoreSamplingParams
from streamserve.errors import InvalidParameterError
from streamserve.llm import async_llm, llm
from streamserve.llm.keywords import flags_of
from streamserve.llm.prompts import per_prompt, read_conversations, read_prompts
from streamserve.llm.sampling_params import choices_of


def test_vllms_names_and_types():
    params = SamplingParams(
        n=1,
        temperature=0.8,
        top_p=0.95,
        top_k=-1,
        min_p=0.0,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        seed=None,
        stop="\n",
        stop_token_ids=[5],
        ignore_eos=False,
        max_tokens=20,
        min_tokens=0,
        logprobs=None,
        prompt_logprobs=None,
        detokenize=True,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        logit_bias={"7": 1.0},
        best_of=None,
        use_beam_search=False,
        logits_processors=None,
    )
    assert isinstance(params, CoreSamplingParams)
    assert (params.stop, params.stop_token_ids, params.top_k) == (("\n",), (5,), 0)
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


def test_no_limit_is_said_with_none():
    assert SamplingParams().max_tokens == 16
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_how_many_answers():
    params = SamplingParams(n=2, best_of=4)
    assert (params.n, params.best_of) == (2, 4)
    assert SamplingParams(n=None).n == 1
    assert SamplingParams() == SamplingParams(n=1) != params
    for wrong, name in (({"n": 0}, "n"), ({"n": 3, "best_of": 2}, "best_of"), ({"n": True}, "n")):
        with pytest.raises(InvalidParameterError, match=f"^{name} must be an integer"):
            SamplingParams(**wrong)


def test_a_beam_search():
    params = SamplingParams(n=2, best_of=4, use_beam_search=True, early_stopping="never")
    choices = choices_of(params)
    assert (choices.n, choices.beams) == (2, BeamSearchParams(beam_width=4, early_stopping="never"))
    assert choices_of(CoreSamplingParams()).beams is None
    assert dataclasses.replace(params, n=1, temperature=0.0).use_beam_search
    for wrong in ({"top_p": 0.5}, {"length_penalty": 99.0}, {"early_stopping": "soon"}):
        with pytest.raises(InvalidParameterError, match=f"^{next(iter(wrong))} m"):
            SamplingParams(use_beam_search=True, **wrong)
    with pytest.raises(InvalidParameterError, match="only with use_beam_search"):
        SamplingParams(length_penalty=2.0)


def test_they_copy_and_travel():
    params = SamplingParams(stop=["a"], max_tokens=None, n=3)
    changed = dataclasses.replace(params, max_tokens=9)
    assert (changed.stop, changed.n, changed.max_tokens) == (("a",), 3, 9)
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(
    ("name", "value"),
    [("guided_decoding", {"regex": "a"}), ("watermarking", True), ("logits_processors", [len])],
)
def test_what_is_not_built_is_refused_by_name(name, value):
    if name in {field.name for field in dataclasses.fields(CoreSamplingParams)}:
        pytest.skip("built by now")
    with pytest.raises(InvalidParameterError, match=f"^{name} is not supported") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    "name", ["temprature", "structured_output", "thinking", "thought_text", "bad_word_ids"]
)
def test_a_name_that_nobody_knows(name):
    with pytest.raises(TypeError, match=f"'{name}'"):
        SamplingParams(**{name: 1.0})


FIELDS = sorted(
    {field.name for field in dataclasses.fields(SamplingParams)}
    - {"bad_word_ids", "structured_output", "thinking", "thought_text", "pooling"}
)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "value", [b"x", 2.5j, object, [None], [object], {"a": 1}, float("nan"), (1, "a")], ids=repr
)
def test_a_value_of_no_such_type_is_refused_by_name(name, value):
    with pytest.raises(InvalidParameterError, match=rf"^{name}\b") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param.startswith(name)


def test_a_single_number_is_no_stop():
    with pytest.raises(InvalidParameterError, match="stop must be a string or an array"):
        SamplingParams(stop=5)


def test_numbers_may_be_numpys():
    params = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), stop_token_ids=np.array([1, 2]), seed=np.int8(3)
    )
    assert (params.n, params.temperature, params.stop_token_ids) == (2, 0.5, (1, 2))
    assert type(params.seed) is int


@pytest.mark.parametrize(
    ("prompts", "read"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], "a"], [[1, 2], "a"]),
        ({"prompt": "a"}, ["a"]),
        ([{"prompt_token_ids": [3]}, {"prompt": "b", "multi_modal_data": None}], [[3], "b"]),
        (("a",), ["a"]),
        ([], []),
    ],
)
def test_prompts_of_every_form(prompts, read):
    assert read_prompts(prompts) == read


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "^prompts must be a string"),
        (["a", 5], r"^prompts\[1\] must be a string"),
        ([[]], r"^prompts\[0\] must be"),
        (
            [{"prompt": "a", "multi_modal_data": {"image": 1}}],
            r"^prompts\[0\] .* 'multi_modal_data'",
        ),
        ([[True]], "must be"),
    ],
)
def test_what_is_no_prompt(prompts, message):
    with pytest.raises(InvalidParameterError, match=message):
        read_prompts(prompts)


def test_conversations_one_or_several():
    one = [{"role": "user", "content": "a"}]
    assert read_conversations(one) == [one]
    assert read_conversations([one, one]) == [one, one]
    for wrong in ([], "a", [[]], [one, "a"], [["a"]]):
        with pytest.raises(InvalidParameterError, match="messages must be"):
            read_conversations(wrong)


def test_one_for_all_or_one_for_each():
    assert per_prompt("priority", 3, 2) == [3, 3]
    assert per_prompt("priority", [1, 2], 2) == [1, 2]
    with pytest.raises(InvalidParameterError, match=r"priority must be one .*\(3\), got 2"):
        per_prompt("priority", [1, 2], 3)


def test_a_dtype_may_be_torchs():
    class Dtype:
        def __str__(self) -> str:
            return "torch.bfloat16"

    assert flags_of(None, {"dtype": Dtype()}).dtype == "bfloat16"


@pytest.mark.parametrize(("given", "seed"), [({}, 0), ({"seed": 7}, 7)])
@pytest.mark.parametrize("module", [llm, async_llm])
def test_the_seed_is_0_unless_it_is_given(module, given, seed, monkeypatch):
    class BuiltError(Exception):
        pass

    def build(model, keywords):
        raise BuiltError(keywords)

    monkeypatch.setattr(module, "build", build)
    with pytest.raises(BuiltError) as built:
        (module.LLM if module is llm else module.AsyncLLM)("m", **given)
    assert built.value.args == ({"seed": seed},)


@pytest.mark.parametrize(
    ("num_tokens", "keeps_first", "num_answer_tokens", "kept"),
    [
        (None, False, 3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (4, False, 3, [8, 9, 10, 11]),
        (4, True, 3, [0, 1, 2, 3]),
        (-1, False, 3, [5, 6, 7, 8, 9, 10, 11]),
        (-1, True, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (-1, False, 10, [11]),  # there is nothing to answer without a prompt
    ],
)
def test_what_is_kept_of_a_prompt(num_tokens, keeps_first, num_answer_tokens, kept):
    truncation = Truncation(num_tokens, keeps_first)
    assert truncation.cut(list(range(12)), 10, num_answer_tokens) == kept
