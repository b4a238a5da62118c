"""The engine on a CUDA device that is not there: what its steps ask of it, counted.

`python -m tests.fake_cuda` does the same for every family and every kind of weights.
"""

from __future__ import annotations

import json

import pytest

from tests.interpreter import run_python

CASES = ("llama", "llama-int8-fp8-cache", "transformers-olmoe", "qwen3.5-mtp")
# Copies to the device beside the one of the step's inputs; all of them from pinned memory, and
# nobody waits for one. Of a step: blocks to copy, what edits its logits. Of a request, in its first
# step: its history (2), its bad words (4), the prompt's tokens whose logprobs are asked for (2).
MORE_COPIES = {
    "prefixes": 1,
    "logprobs": 1,
    "penalties": 1 + 2 * 8,
    "many_penalties": 1 + 2 * 8,
    "biases": 1,
    "bad_words": 1 + 4 * 8,
    "masks": 1,
    "prompt_logprobs": 2,
    "everything": 3,
    "preempted": 1,
    "cancelled": 1,
    "out_of_memory": 1,
    "drafts": 1 + 2 * 8,
}
COPIES_BACK = {"drafts": 3, "logprobs": 3, "prompt_logprobs": 4, "embeddings": 4, "everything": 7}
# With host memory for blocks: the indices of either direction and the blocks, in runs of rows; and
# prompts that come again find blocks to copy.
HOST_COPIES = {"llama-int8-fp8-cache": 10}


NOTHING = {"device bytes": 0, "pinned bytes": 0, "graphs": 0, "work spaces": 0, "threads": []}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    pytest.importorskip("triton")
    done = run_python("-m", "tests.fake_cuda", *CASES, TRITON_INTERPRET=None)
    return {report["case"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(params=CASES)
def report(request, reports) -> dict:
    return reports[request.param]


def test_nothing_went_wrong(report):
    assert report["findings while building"] == {}
    for name, scenario in report["scenarios"].items():
        assert (name, scenario["error"], scenario["findings"]) == (name, None, {})
        assert scenario["steps"] or name == "failed_capture"
    assert report["graphs"] >= 9
    assert report["closed"] == {"findings": [], **NOTHING}


def test_no_step_waits_and_each_has_one_copy_of_its_inputs(report):
    for name, scenario in report["scenarios"].items():
        for told in scenario["steps"]:
            counts = json.loads(told)
            assert not counts.keys() & {"blocking h2d", "blocking d2h"}, (name, counts)
            # A capture waits before (once for us, once in torch) and after; where a head works
            # behind the last step there may be something to wait for each time.
            most_waits = 3 * (name == "asked_before_captured")
            assert counts.get("wait", 0) <= most_waits, (name, counts)
            more = HOST_COPIES.get(report["case"], 0)
            assert counts.get("h2d", 0) <= 1 + more + MORE_COPIES.get(name, 0), (name, counts)
            assert counts.get("d2h", 0) <= 1 + more + COPIES_BACK.get(name, 0), (name, counts)


def test_drafts_were_among_the_scenarios(reports):
    assert "drafts" in reports["llama-int8-fp8-cache"]["scenarios"]


def test_logits_are_sampled_from_where_the_head_put_them(report):
    """A step's graph copies nothing; a model through transformers has a head of its own."""
    is_ours = not report["case"].startswith("transformers")
    assert report["copies in graphs"] == (0 if is_ours else report["graphs"])


def test_the_host_waits_for_nothing_but_the_event_behind_each_step(report):
    for name, scenario in report["scenarios"].items():
        waits = dict(scenario["waits"])
        num_waits = waits.pop("streamserve-device: wait device", 0)
        guesses = [wait for wait in waits if wait.startswith("streamserve-results: wait d2h")]
        assert bool(guesses) == (name == "drafts" and report["case"].endswith("mtp")), name
        for wait in guesses:
            del waits[wait]
        if name != "failed_capture":
            assert waits.keys() == {"streamserve-results: wait event"}, name
            assert waits["streamserve-results: wait event"] <= sum(scenario["steps"].values())
            assert bool(num_waits) == (name == "asked_before_captured"), name  # a capture waits


def test_every_kernel_was_met_before_the_runner_was_ready(report):
    for name, scenario in report["scenarios"].items():
        assert (name, scenario["late"]) == (name, [])
        # A sum that was begun in an earlier step is the one thing that no warm-up has.
        assert set(scenario["late operations"]) <= {"aten::add_"}, name
    assert report["compilations"] == 0


def test_whoever_closes_an_llm_has_nothing_of_the_device():
    """The object is held on, or the error that it died of; or it was never built."""
    pytest.importorskip("triton")
    report = json.loads(run_python("-m", "tests.fake_cuda.closing", TRITON_INTERPRET=None).stdout)
    assert report.pop("findings") == {}
    before = report.pop("open")
    assert all(before[what] for what in NOTHING), before
    errors = {name: left.pop("error", None) for name, left in report.items()}
    assert report == dict.fromkeys(report, NOTHING)
    assert errors.pop("one closed, one dead") == "EngineDeadError"
    assert set(errors.values()) == {"KVCacheMemoryError"}, errors
