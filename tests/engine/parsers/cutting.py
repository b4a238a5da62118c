"""Texts cut anywhere."""

from itertools import pairwise

from hypothesis import strategies as st

cuts = st.lists(st.integers(0, 400), max_size=30)


def pieces(text: str, bounds: list[int]) -> list[str]:
    """``text`` cut at ``bounds``, which may lie anywhere."""
    inside = sorted({bound % (len(text) + 1) for bound in bounds})
    return [text[a:b] for a, b in pairwise([0, *inside, len(text)])]
