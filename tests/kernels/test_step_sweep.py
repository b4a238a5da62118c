"""What a step takes its time with, and its products' kernels tried in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import step_profile
from device_bench.attention_plans import CHUNKS, DECODES, SHARED, changed
from device_bench.step_sweep import Event, Part, of_products, parts, sweep
from streamserve_kernels.triton import attention
from streamserve_kernels.triton.tuning import LIBRARY, Config


def test_a_kernel_counts_from_the_end_of_all_before_it():
    """The second one starts early and ends last; the third, inside it, costs nothing."""
    step = [
        Event("product", 0.0, 10.0),
        Event("norm", 4.0, 13.0),
        Event("copy", 5.0, 11.0),
        Event("product", 15.0, 20.0),
    ]
    again = [Event(e.name, e.begin + 100.0, e.end + 100.0) for e in step]
    found = parts([*again, *step], num_steps=2)
    assert found == [
        Part("product", 2.0, (10.0 + 7.0 + 80.0 + 10.0 + 7.0) / 2, (2.0 + 80.0 + 2.0) / 2),
        Part("norm", 1.0, 3.0, 0.0),
        Part("copy", 1.0, 0.0, 0.0),
    ]
    assert sum(part.prolonged for part in found) == 120.0 / 2


# Tokens, most of a request, whether there are groups.
ASKED = [(1, 1, False), (64, 1, False), (64, 1, True), (4096, 4096, False)]


def product(chosen: Config, *candidates: Config) -> SimpleNamespace:
    return SimpleNamespace(choices={4: chosen}, candidates=lambda rows: candidates)


def test_each_kernel_is_tried_in_the_step_and_the_best_is_left():
    early, other = Config("gemv", 1, 4, overlap=True), Config("gemv", 1, 8, overlap=True)
    late = early._replace(overlap=False)
    first = [product(LIBRARY, early, LIBRARY) for _ in range(2)]
    second = [product(other, early, other)]
    no_room = Config("gemv", 1, 16, overlap=True)
    first[0].candidates = lambda rows: (early, no_room, LIBRARY)
    seconds = {LIBRARY: 5000.0, early: 6000.0, late: 4000.0}

    def measure() -> float:
        assert first[0].choices == first[1].choices
        chosen = first[0].choices[4], second[0].choices[4]
        # Hardly better is not better.
        return seconds[chosen[0]] + (3000.0 if chosen[1] == other else 2999.0)

    def can_run(layer: SimpleNamespace, config: Config) -> bool:
        assert layer in (first[0], second[0])
        return config.block_n < 16

    tried = list(sweep(of_products({"a": first, "b": second}, 4, can_run), measure))
    assert tried == [
        ("a", LIBRARY, 8000.0),
        ("a", early, 9000.0),
        ("a", late, 7000.0),
        ("b", other, 7000.0),
        ("b", early, 6999.0),
        ("b", late, 6999.0),
        ("b", other._replace(overlap=False), 6999.0),
    ]
    assert {layer.choices[4] for layer in first} == {late}
    assert second[0].choices == {4: other}


def test_what_was_tried_is_told_before_the_next_is():
    """A sweep that is ended early has lost nothing."""
    early = Config("gemv", 1, 4, overlap=True)
    seconds, told = [4000.0, 5000.0], []

    def measure() -> float:
        if not seconds:
            raise KeyboardInterrupt
        return seconds.pop()

    tried = sweep(of_products({"a": [product(LIBRARY, early)]}, 4, lambda *_: True), measure)
    with pytest.raises(KeyboardInterrupt):
        told.extend(one.seconds for one in tried)
    assert told == [5000.0, 4000.0]


@pytest.mark.parametrize("candidates", [DECODES, CHUNKS, SHARED])
def test_sizes_of_attention_are_changes_of_the_plan(candidates):
    """As planned is the first, and nothing else is as planned for both few and many requests."""
    plan = attention.plan
    ask = [(4, 128, tokens, most, groups) for tokens, most, groups in ASKED]
    planned = [plan(*sizes) for sizes in ask]
    made = {}
    for name, changes in candidates.items():
        with changed(changes):
            made[name] = [attention.plan(*sizes) for sizes in ask]
        assert attention.plan is plan
    assert made.pop("as planned") == planned
    assert planned not in made.values()
    assert len({repr(sizes) for sizes in made.values()}) == len(made)


def test_without_a_gpu_there_is_nothing_to_profile(monkeypatch, capsys):
    monkeypatch.setattr(step_profile.torch.cuda, "is_available", lambda: False)
    assert step_profile.main(["/nowhere", "--sweep", "--batch-size", "1", "64"]) == 2
    assert "no GPU" in capsys.readouterr().err
