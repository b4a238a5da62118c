"""The AVX-512 intrinsics that avx2.h makes of 256-bit ones, beside the instructions themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from streamserve_kernels.native import library

CASES = Path(__file__).with_name("avx2.c")
SOURCES = Path(library.__file__).with_name("src")
HAS_BOTH = "v4" in library.runnable_builds()  # before any test pretends to be on another CPU


def _names() -> set[str]:
    text = "".join((SOURCES / name).read_text() for name in ("avx2.h", "avx2_names.h"))
    return set(re.findall(r"^#define (_mm\w+)", text, re.MULTILINE))


def _results(compiler: str, folder: Path, *flags: str) -> dict[str, tuple[str, bytes]]:
    """By the names of the cases: the kind of each one's results, and the bytes of them all."""
    program = folder / flags[0].removeprefix("-march=")
    options = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *flags, f"-I{SOURCES}")
    subprocess.run([compiler, *options, str(CASES), "-o", str(program)], check=True)
    printed = subprocess.run([program], check=True, stdout=subprocess.PIPE).stdout
    results, at = {}, 0
    while at < len(printed):
        end = printed.index(b"\n", at)
        name, kind, size = printed[at:end].decode().split()
        at = end + 1 + int(size)
        results[name] = (kind, printed[end + 1 : at])
    return results


def test_every_intrinsic_has_a_case() -> None:
    text = CASES.read_text()
    missing = {
        name
        for name in _names()
        if not re.search(rf"{name}\(|\b{name.removeprefix('_mm512_')}\b", text)
    }
    assert not missing


def test_they_are_the_instructions(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    if not HAS_BOTH:
        pytest.skip("this CPU has no AVX-512")
    made = _results(compiler, tmp_path, "-march=x86-64-v3")
    real = _results(compiler, tmp_path, "-march=x86-64-v4", "-mavx512vnni")
    assert list(made) == list(real)
    assert len(made) >= 75
    for name, (kind, expected) in real.items():
        words = np.frombuffer(made[name][1], np.uint32), np.frombuffer(expected, np.uint32)
        differs = words[0] != words[1]
        if kind == "f":
            differs &= ~(np.isnan(words[0].view(np.float32)) & np.isnan(words[1].view(np.float32)))
        at = np.flatnonzero(differs)
        assert not at.size, (
            f"{name}: {at.size} of {differs.size} differ, the first at {at[0]}: "
            f"{words[0][at[0]]:08x} instead of {words[1][at[0]]:08x}"
        )
