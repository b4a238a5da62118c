"""What a step on a GPU takes its time with, and which of its kernels are best in it.

Both in the step's CUDA graph, where kernels overlap: what each prolongs it by, not how long each
runs; and a kernel by the time of the whole step, not of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from streamserve_kernels.triton.tuning import Config, Tunable

# What is less than this share of a step is noise.
_NOISE = 0.002


class Event(NamedTuple):
    """A kernel, or a copy, as a profiler saw it; times in microseconds."""

    name: str
    begin: float
    end: float


class Part(NamedTuple):
    """Of a step, on average: kernels of one name."""

    name: str
    count: float
    prolonged: float  # µs by which the step would end sooner without them
    waited: float  # of these, with nothing running


def parts(events: Iterable[Event], num_steps: int) -> list[Part]:
    """What prolongs steps most comes first. A kernel counts from the end of all before it."""
    sums: dict[str, list[float]] = {}
    latest: float | None = None
    for event in sorted(events, key=lambda event: event.begin):
        if latest is None:
            latest = event.begin
        of_name = sums.setdefault(event.name, [0.0, 0.0, 0.0])
        of_name[0] += 1
        of_name[1] += max(event.end - latest, 0.0)
        of_name[2] += max(event.begin - latest, 0.0)
        latest = max(latest, event.end)
    found = [
        Part(name, *(value / num_steps for value in of_name)) for name, of_name in sums.items()
    ]
    return sorted(found, key=lambda part: part.prolonged, reverse=True)


class Choice(NamedTuple):
    """Something of a step that may be done in several ways."""

    key: str
    now: Hashable
    options: Sequence[Hashable]
    choose: Callable[[Any], object]
    can_run: Callable[[Any], bool]  # loads a kernel too: a graph is not the place for it


class Tried(NamedTuple):
    """A choice, and what a step took with it."""

    key: str
    option: Hashable
    seconds: float


def sweep(choices: Iterable[Choice], measure: Callable[[], float]) -> Iterator[Tried]:
    """Tries each choice's options in turn, and leaves the best of them chosen.

    `measure` makes a step anew with what is chosen and returns its seconds. An option is kept where
    the step is shorter by more than noise. What has been tried is told before the next is.
    """
    best = measure()
    for choice in choices:
        kept = Tried(choice.key, choice.now, best)
        found = [kept]
        yield kept
        for option in dict.fromkeys(choice.options):
            if option != choice.now and choice.can_run(option):
                choice.choose(option)
                found.append(Tried(choice.key, option, measure()))
                yield found[-1]
        fastest = min(found, key=lambda one: one.seconds)
        if fastest.seconds < best * (1.0 - _NOISE):
            kept, best = fastest, fastest.seconds
        choice.choose(kept.option)


def of_products(
    products: Mapping[str, Sequence[Tunable]],
    rows: int,
    can_run: Callable[[Tunable, Config], bool],
) -> Iterator[Choice]:
    """The kernels of all products of one key. Those that overlap are tried without that, too."""
    for key, layers in products.items():
        candidates = layers[0].candidates(rows)
        plain = [config._replace(overlap=False) for config in candidates]

        def choose(config: Config, layers: Sequence[Tunable] = layers) -> None:
            for layer in layers:
                layer.choices[rows] = config

        yield Choice(
            key,
            layers[0].choices[rows],
            [*candidates, *plain],
            choose,
            partial(can_run, layers[0]),
        )
