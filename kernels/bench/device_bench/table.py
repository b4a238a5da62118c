"""The table: line by line in the terminal, in markdown, in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from device_bench.measure import Result
from device_bench.worker import Report

_WIDTHS = (36, 6, 10, 10, 7, 7, 9)
_HEAD = ("", "check", "µs", "floor", "of", "share", "rate")


def replace_text(file: Path, text: str) -> None:
    """Whenever this process is ended, the file has all of what it had, or all of ``text``."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)


def describe(report: Report) -> list[str]:
    """Hardware, versions and ceilings, a line each."""
    lines = [f"{name:<9} {value}" for name, value in report.machine.items()]
    if report.kernels:
        lines.append(f"{'kernels':<9} {report.kernels}")
    if (ceilings := report.ceilings) is not None:
        lines.append(f"{'ceilings':<9} {ceilings_line(ceilings)}")
    return lines


def ceilings_line(ceilings: Mapping[str, float | None]) -> str:
    copied, read, product = (ceilings[name] or 0.0 for name in ("copy", "read", "product"))
    words = [
        f"copy {copied / 1e12:.2f} TB/s (read + written)",
        f"read {read / 1e12:.2f} TB/s",
        f"bfloat16 product {product / 1e12:.1f} TFLOP/s",
    ]
    if float8 := ceilings.get("product_fp8"):
        words.append(f"float8 product {float8 / 1e12:.1f} TFLOP/s")
    return ", ".join(words)


def cells(result: Result) -> tuple[str, ...]:
    """A row's cells but for the peers; the rate is in GB/s or TFLOP/s, whichever is the floor's."""
    seconds = result.seconds
    if seconds is None:
        return (result.name, result.status, "", "", "", "", "")
    if result.floor_of == "bytes":
        rate = f"{result.num_bytes / seconds / 1e9:.0f} GB/s"
    else:
        rate = f"{result.flops / seconds / 1e12:.0f} TF/s"
    launched = "" if result.method == "graph" else f" {result.method}"
    share = 0.0 if result.share is None else result.share
    floor = 0.0 if result.floor is None else result.floor
    return (
        result.name,
        result.status,
        f"{1e6 * seconds:.1f}{launched}",
        f"{1e6 * floor:.1f}",
        result.floor_of or "",
        f"{share:.0%}",
        rate,
    )


def peers_cell(result: Result) -> str:
    """Each peer's time in µs, and how many times ours it is."""
    words = []
    for name, taken in result.peers.items():
        if isinstance(taken, str):
            words.append(f"{name}: {taken[:60]}")
        elif result.seconds:
            words.append(f"{name} {1e6 * taken:.1f} ({taken / result.seconds:.2f}x)")
    return ", ".join(words)


def terminal_head(group: str) -> str:
    return "\n" + _aligned((group, *_HEAD[1:])) + "  peers, µs (times ours)"


def terminal_line(result: Result) -> str:
    """One row; what went wrong stands where its times would be."""
    line = _aligned(cells(result))
    if result.error is not None:
        return f"{line.rstrip()}  {result.error}"
    return f"{line}  {peers_cell(result)}".rstrip()


def _aligned(row: Sequence[str]) -> str:
    first, *others = row
    padded = [text.rjust(width) for text, width in zip(others, _WIDTHS[1:], strict=True)]
    return " ".join([first.ljust(_WIDTHS[0]), *padded])


def markdown(report: Report) -> str:
    """The whole report as a page."""
    lines = [f"- {line}" for line in describe(report)]
    group = None
    for result in report.results:
        if result.group != group:
            group = result.group
            head = [f"{group}", *_HEAD[1:], "peers, µs (times ours)"]
            lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        last = peers_cell(result) if result.error is None else result.error
        row = [*cells(result), last]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> dict[str, Any]:
    """Everything that was measured; times in seconds."""
    return {
        "machine": report.machine,
        "kernels": report.kernels,
        "ceilings": report.ceilings,
        "rows": [result.to_json() for result in report.results],
    }
