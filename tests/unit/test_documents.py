"""What README and docs/ refer to exists: pages, headings, files, flags, parsers."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from streamserve.cli.args import REASONING_PARSERS, TOOL_CALL_PARSERS, build_parser
from streamserve.cli.device_flags import CPU_DEFAULTS, GPU_DEFAULTS
from streamserve.cli.peer_flags import PeerAction
from streamserve.cli.quantization import STORED_METHODS
from streamserve.cli.vllm_flags import option

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "kernels/*.md", "streamserve/**/*.md", "tools/**/*.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = ("", "streamserve", "kernels", "kernels/streamserve_kernels", "kernels/bench", "loadtest")
"""Where a file that a page names is looked for, besides beside the page."""

NOT_HERE = ("build/", "llama.cpp/")
OTHERS_FLAGS = {
    *("--dist", "--inplace", "--prefix"),  # pytest's, setuptools', npm's
    *("--outfile", "--outtype", "--task", "--weight-format"),  # llama.cpp's, optimum's
}


def text_of(page: str, *, with_blocks: bool = True) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text if with_blocks else re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = text_of(path.relative_to(ROOT).as_posix(), with_blocks=False)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_there_are_pages():
    assert {"README.md", "docs/api.md", "kernels/README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page):
    here = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page, with_blocks=False)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (here.parent / name).resolve() if name else here
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    """Those with a folder in their names: others may be a checkpoint's."""
    folders = [ROOT / folder for folder in FOLDERS] + [(ROOT / page).parent]
    path = r"(?<![\w./*…-])\w[\w.-]*(?:/[\w.-]+)+\.(?:py|c|h|md|mjs|json)\b"
    for name in sorted(set(re.findall(path, text_of(page)))):
        is_there = any((folder / name).is_file() for folder in folders)
        assert is_there or name.startswith(NOT_HERE), name


def test_every_file_of_the_kernels_is_on_their_map():
    [tree] = re.findall(
        r"```\n(streamserve_kernels/.*?)```", text_of("kernels/README.md"), re.DOTALL
    )
    package = ROOT / "kernels" / "streamserve_kernels"
    files = {p.name for suffix in ("py", "c", "h") for p in package.rglob(f"*.{suffix}")}
    assert files - {"__init__.py"} <= set(tree.split())


def own_flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if not isinstance(action, PeerAction):
            yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from own_flags(command)


def test_flags_that_are_named_exist():
    known = set(own_flags(build_parser())) | OTHERS_FLAGS
    for folder in ("kernels/bench", "loadtest", "tests", "tools"):  # their parsers are in scripts
        for file in (ROOT / folder).rglob("*.py"):
            known.update(re.findall(r'"(--[a-z][\w-]*)"', file.read_text(encoding="utf-8")))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(page)))
        assert not named - known, page


def test_defaults_that_are_named_are_the_flags():
    """As "`--a-flag` (60 s)", or in a table's second column; a CPU's, where a GPU has another."""
    serve = build_parser().commands["serve"]
    defaults = {flag: action.default for action in serve._actions for flag in action.option_strings}
    for of_device in (GPU_DEFAULTS, CPU_DEFAULTS):
        given = asdict(of_device).items()
        defaults.update({option(name): value for name, value in given if value is not None})
    units = {"": 1, "s": 1, "KiB": 2**10, "MiB": 2**20}
    named = re.findall(
        r"`(--[\w-]+)`(?: seconds)?(?: \||\s\()\s*([\d,.]+) ?(s|KiB|MiB|)\b",
        "".join(map(text_of, PAGES)),
    )
    assert len(named) >= 10
    for flag, number, unit in named:
        assert defaults[flag] == float(number.replace(",", "")) * units[unit], flag


def named_in_first_column(text: str) -> set[str]:
    """Of the rows of all tables, without their heads."""
    rows = re.findall(r"(?<!\n\n)^\| (`.*?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}


def test_every_parser_has_a_row():
    of_tools, of_thoughts = text_of("docs/parsers.md").split("\n\n| `--reasoning-parser` |")
    assert named_in_first_column(of_tools) == set(TOOL_CALL_PARSERS)
    assert named_in_first_column(of_thoughts) == set(REASONING_PARSERS)


def test_every_stored_format_has_a_row():
    assert named_in_first_column(text_of("docs/quantization.md")) == {*STORED_METHODS} - {"gguf"}
