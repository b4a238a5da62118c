"""Stop strings: found however the text is cut, holding back only what may still become one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from streamserve.core.sampling_params import SamplingParams
from streamserve.core.thinking import ThoughtText


class _Automaton:
    """Aho–Corasick over the stop strings: state ``s`` is a prefix of some of them.

    ``next[s]`` has the transitions that do not lead to the root; ``match[s]`` is the longest stop
    string that ends here; ``num_held[s]`` is the length of the longest suffix of the text that
    some stop string continues.
    """

    __slots__ = ("firsts", "match", "next", "num_held")

    def __init__(self, stops: Sequence[str]) -> None:
        children: list[dict[str, int]] = [{}]
        depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            state = 0
            for character in stop:
                if character not in children[state]:
                    children[state][character] = len(children)
                    children.append({})
                    depth.append(depth[state] + 1)
                    self.match.append(None)
                state = children[state][character]
            self.match[state] = stop
        self.firsts = tuple(children[0])
        self.next = [dict(edges) for edges in children]
        self.num_held = [0] * len(children)
        self._link(children, depth)

    def _link(self, children: list[dict[str, int]], depth: list[int]) -> None:
        """Breadth first, so that a state's shorter suffixes are done before it."""
        queue = deque((child, 0) for child in children[0].values())
        while queue:
            state, fallback = queue.popleft()
            self.match[state] = self.match[state] or self.match[fallback]
            self.num_held[state] = depth[state] if children[state] else self.num_held[fallback]
            for character, child in children[state].items():
                queue.append((child, self.next[fallback].get(character, 0)))
            self.next[state] = {**self.next[fallback], **children[state]}


_automaton_of = lru_cache(maxsize=256)(_Automaton)
"""Most requests of a client carry the same stop strings."""


class StopChecker:
    """Looks for stop strings in a text that arrives in pieces.

    The match that ends first wins, of several that end together the longest: so neither the cuts
    nor the order of ``stops`` change the answer. Without ``include_stop`` the text ends before
    the match, else behind it.
    """

    __slots__ = ("_automaton", "_held", "_include_stop", "_state")

    def __init__(self, stops: tuple[str, ...], include_stop: bool) -> None:
        self._automaton = _automaton_of(stops)
        self._include_stop = include_stop
        self._held = ""
        self._state = 0

    def add(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Return ``(text that is certain, the stop string that matched or None)``.

        With ``may_stop`` false a match that ends in ``text`` does not count (``min_tokens``). After
        a match nothing more may be added.
        """
        automaton = self._automaton
        state = self._state
        if state == 0:
            for first in automaton.firsts:
                if first in text:
                    break
            else:
                return text, None
        transitions, match = automaton.next, automaton.match
        for position, character in enumerate(text):
            state = transitions[state].get(character, 0)
            if match[state] is not None and may_stop:
                return self._matched(self._held + text[: position + 1], match[state])
        self._state = state
        text = self._held + text
        num_held = automaton.num_held[state]
        if not num_held:
            self._held = ""
            return text, None
        self._held = text[-num_held:]
        return text[:-num_held], None

    def flush(self) -> str:
        """The text has ended: return what was held back."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _matched(self, text: str, stop: str | None) -> tuple[str, str | None]:
        assert stop is not None
        self._held, self._state = "", 0
        return (text if self._include_stop else text[: -len(stop)]), stop


class _Thoughts:
    """Tells thoughts, their marks and the white space behind them from what follows."""

    __slots__ = ("_end", "_is_inside", "_start", "_tail", "held", "is_over")

    def __init__(self, thoughts: ThoughtText) -> None:
        self._start, self._end = thoughts.start, thoughts.end
        self._is_inside = thoughts.is_open
        self._tail = ""  # of the thoughts: what ``end`` may have begun in
        self.held = ""  # what may become ``start``
        self.is_over = False

    def split(self, text: str) -> tuple[str, str]:
        """The next text as (what belongs to the thoughts, what is behind them)."""
        if not (self._is_inside or self._tail):
            text, self.held = self.held + text, ""
            begun = text.lstrip()
            self._is_inside = begun.startswith(self._start)
            if not self._is_inside and self._start.startswith(begun):
                self.held = text
                return "", ""
            if not self._is_inside:
                self.is_over = True
                return "", text
        num_thought = 0
        if self._is_inside:
            seen = self._tail + text
            end = seen.find(self._end)
            if end < 0:
                self._tail = seen[1 - len(self._end) :]
                return text, ""
            num_thought = end + len(self._end) - len(self._tail)
            self._is_inside, self._tail = False, self._end
        behind = text[num_thought:].lstrip()
        self.is_over = bool(behind)
        return text[: len(text) - len(behind)], behind


class StopCheckerBehindThoughts(StopChecker):
    """The same, which does not look in ``thoughts``, nor in the white space behind them."""

    __slots__ = ("_thoughts",)

    def __init__(self, stops: tuple[str, ...], include_stop: bool, thoughts: ThoughtText) -> None:
        super().__init__(stops, include_stop)
        self._thoughts: _Thoughts | None = _Thoughts(thoughts)

    def add(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """As of ``StopChecker``."""
        if self._thoughts is None:
            return super().add(text, may_stop=may_stop)
        thought, text = self._thoughts.split(text)
        if self._thoughts.is_over:
            self._thoughts = None
        certain, matched = super().add(text, may_stop=may_stop)
        return thought + certain, matched

    def flush(self) -> str:
        """As of ``StopChecker``."""
        held = super().flush()
        return held if self._thoughts is None else self._thoughts.held + held


def stop_checker(params: SamplingParams) -> StopChecker | None:
    """What looks for the stop strings of a request, ``None`` where there are none."""
    if not params.stop:
        return None
    if params.thought_text is None:
        return StopChecker(params.stop, params.include_stop_str_in_output)
    return StopCheckerBehindThoughts(
        params.stop, params.include_stop_str_in_output, params.thought_text
    )
