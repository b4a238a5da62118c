"""What a step on a GPU takes its time with, and which kernels of its products are best in it.

Both in the step's CUDA graph, where kernels overlap: what each prolongs it by, not how long each
runs; and a product's kernel by the time of the whole step, not of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

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


class Tried(NamedTuple):
    """A kernel for all products of one key, and what a step took with it."""

    key: str
    config: Config
    seconds: float


def sweep(
    products: Mapping[str, Sequence[Tunable]],
    rows: int,
    measure: Callable[[], float],
    can_run: Callable[[Tunable, Config], bool],
) -> list[Tried]:
    """Tries each product's kernels in turn, and leaves the best of them chosen.

    `measure` makes a step anew with what is chosen and returns its seconds; before it, `can_run`
    loads a kernel, if the device has room for it. A kernel is kept where the step is shorter by
    more than noise. Also without overlapping are tried those that overlap.
    """
    tried = []
    best = measure()
    for key, layers in products.items():
        kept = Tried(key, layers[0].choices[rows], best)
        tried.append(kept)
        candidates = layers[0].candidates(rows)
        plain = [config._replace(overlap=False) for config in candidates]
        for config in dict.fromkeys([*candidates, *plain]):
            if config != kept.config and can_run(layers[0], config):
                _choose(layers, rows, config)
                tried.append(Tried(key, config, measure()))
        fastest = min((one for one in tried if one.key == key), key=lambda one: one.seconds)
        if fastest.seconds < best * (1.0 - _NOISE):
            kept, best = fastest, fastest.seconds
        _choose(layers, rows, kept.config)
    return tried


def _choose(layers: Sequence[Tunable], rows: int, config: Config) -> None:
    for layer in layers:
        layer.choices[rows] = config
