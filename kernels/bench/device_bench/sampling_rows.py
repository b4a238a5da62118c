"""Rows of sampling from logits [L, V] as the head leaves them, without a full sort."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from device_bench.peers import Peers, sampling_peers
from device_bench.row import Bench, Case, CheckError, Row, check_equal
from device_bench.timing import Call

_COUNT = 64
_CONTRACT = "streamserve_kernels.sampling"
_NAIVE = "streamserve_kernels.naive_sampling"
_TRITON = "streamserve_kernels.triton.sampling"
# Two correct sums in another order may fall on either side of a draw.
_MOST_OTHER_DRAWS = 1 / 32
_ROWS_OF_ONE = 6  # five drafts, and what follows them


def rows(quick: bool) -> list[Row]:
    made = {
        "greedy": _greedy,
        "temperature": lambda bench: _sampled(bench, top_k=0, top_p=1.0, min_p=0.0),
        "top-k, top-p, min-p": lambda bench: _sampled(bench, top_k=50, top_p=0.9, min_p=0.05),
        "top-p alone": lambda bench: _sampled(bench, top_k=0, top_p=0.95, min_p=0.0),
        "all, with penalties": lambda bench: _sampled(
            bench, top_k=50, top_p=0.9, min_p=0.05, penalties=True
        ),
        "all, with penalties and drafts": lambda bench: _sampled(
            bench, top_k=50, top_p=0.9, min_p=0.05, penalties=True, drafts=True
        ),
        "temperature, grammars": lambda bench: _sampled(
            bench, top_k=0, top_p=1.0, min_p=0.0, masked=True
        ),
        "logprobs, best 5": _logprobs,
        "add_tokens": _add_tokens,
    }
    names = ("greedy", "top-k, top-p, min-p") if quick else tuple(made)
    return [Row("sampling", f"{name}, {_COUNT} x vocabulary", made[name]) for name in names]


def _module(bench: Bench) -> Any:
    """Sampling is no part of the contract of all backends: only Triton's has it so far."""
    is_naive = bench.kernels.name == "naive"
    return importlib.import_module(_NAIVE if is_naive else _TRITON)


def _logits(bench: Bench) -> Tensor:
    """As flat as a model's: a few likely tokens, and a long tail."""
    shape = bench.sizes.requests(_COUNT), bench.sizes.vocab
    return (3 * torch.randn(shape, device=bench.device)).to(bench.dtype)


def _case(
    bench: Bench,
    function: Callable[[Tensor], object],
    check: Callable[[], None],
    num_bytes: float = 0.0,
    peers: Peers | None = None,
) -> Case:
    """`num_bytes` is what is read beside the logits."""
    nbytes = _logits(bench).nbytes
    return Case(_rotated(bench, function), check, nbytes + num_bytes, peers=peers or {})


def _rotated(bench: Bench, function: Callable[[Tensor], object]) -> Sequence[Call]:
    def make() -> Call:
        logits = _logits(bench)
        return lambda: function(logits)

    return bench.rotated(make, _logits(bench).nbytes)


def _greedy(bench: Bench) -> Case:
    greedy, naive = _module(bench).greedy, importlib.import_module(_NAIVE)

    def check() -> None:
        logits = _logits(bench)
        check_equal(greedy(logits), naive.greedy(logits))

    peers: Peers = {"argmax": lambda: _rotated(bench, lambda logits: logits.argmax(dim=-1))}
    return _case(bench, greedy, check, peers=peers)


def _sampled(
    bench: Bench,
    *,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: bool = False,
    masked: bool = False,
    drafts: bool = False,
) -> Case:
    module, naive = _module(bench), importlib.import_module(_NAIVE)
    count, device = bench.sizes.requests(_COUNT), bench.device
    tensors = importlib.import_module(_CONTRACT).SamplingTensors(
        torch.full((count,), 0.8, device=device),
        torch.full((count,), top_k, dtype=torch.int32, device=device),
        torch.full((count,), top_p, dtype=torch.float64, device=device),
        torch.full((count,), min_p, device=device),
        torch.rand(count, dtype=torch.float64, device=device),
    )
    edits = _edits(bench, count, penalties, masked) if penalties or masked else None
    if edits is not None and drafts:
        places = torch.arange(count, dtype=torch.int32, device=device)
        guesses = torch.where(places % _ROWS_OF_ONE < _ROWS_OF_ONE - 1, places, -1)
        edits = edits._replace(drafts=guesses, num_before=places % _ROWS_OF_ONE)

    def check() -> None:
        logits = _logits(bench)
        ours, theirs = (m.sample(logits, tensors, edits) for m in (module, naive))
        others = int((ours != theirs).sum())
        if others > max(1, count * _MOST_OTHER_DRAWS):
            raise CheckError(f"{others} of {count} draws are others than the naive twin's")

    def draw(logits: Tensor) -> Tensor:
        return module.sample(logits, tensors, edits)

    def plain(logits: Tensor) -> Tensor:
        return naive.sample(logits, tensors, edits)

    peers: Peers = {"plain torch": lambda: _rotated(bench, plain)}
    if edits is None and not min_p:
        peers |= sampling_peers(bench, _rotated, top_k, top_p)
    read = [
        part.nbytes
        for part in (edits or ())
        if part is not None and part.dim() == 2 and part.shape[0] == count
    ]
    return _case(bench, draw, check, sum(read), peers)


def _edits(bench: Bench, count: int, penalties: bool, masked: bool) -> Any:
    """Every row has each penalty and a thousand tokens behind it, or half of its tokens."""
    device = bench.device
    rows = torch.arange(count, dtype=torch.int32, device=device)
    none = torch.full_like(rows, -1)
    words = -(-bench.sizes.vocab // 32)
    masks = torch.randint(-(2**31), 2**31, (count if masked else 1, words), device=device)
    size = count if penalties else 1
    counts = torch.zeros(size, bench.sizes.vocab, dtype=torch.int32, device=device)
    seen = torch.randint(bench.sizes.vocab, (size, 1000), device=device)
    counts.scatter_add_(1, seen, torch.ones_like(seen, dtype=torch.int32))
    return importlib.import_module(_CONTRACT).LogitsEditTensors(
        rows=rows if penalties else none,
        counts=counts,
        repetition=torch.full((count,), 1.1, device=device),
        presence=torch.full((count,), 0.2, device=device),
        frequency=torch.full((count,), 0.3, device=device),
        bias_start=torch.zeros(count + 1, dtype=torch.int32, device=device),
        bias_ids=torch.zeros(1, dtype=torch.int32, device=device),
        bias_values=torch.zeros(1, device=device),
        mask_rows=rows if masked else none,
        masks=masks.int(),
    )


def _logprobs(bench: Bench) -> Case:
    module, naive = _module(bench), importlib.import_module(_NAIVE)
    ids = torch.randint(bench.sizes.vocab, (bench.sizes.requests(_COUNT),), device=bench.device)

    def check() -> None:
        logits = _logits(bench)
        ours, theirs = (m.logprobs(logits, ids, 5) for m in (module, naive))
        check_equal(ours.top_ids, theirs.top_ids, "ids")
        for what in ("chosen", "top"):
            off = (getattr(ours, what) - getattr(theirs, what)).abs().max()
            if not float(off) < 1e-3:
                raise CheckError(f"{what}: off by {float(off):.2g}")

    def find(logits: Tensor) -> object:
        return module.logprobs(logits, ids, 5)

    def plain(logits: Tensor) -> object:
        return logits.log_softmax(-1).topk(5)

    peers: Peers = {"log_softmax, topk": lambda: _rotated(bench, plain)}
    return _case(bench, find, check, peers=peers)


def _add_tokens(bench: Bench) -> Case:
    module, naive = _module(bench), importlib.import_module(_NAIVE)
    count, vocab = bench.sizes.requests(_COUNT), bench.sizes.vocab
    rows = torch.arange(count, dtype=torch.int32, device=bench.device)
    ids = torch.randint(vocab, (count,), device=bench.device)
    counts = torch.zeros(count, vocab, dtype=torch.int32, device=bench.device)

    def check() -> None:
        ours, theirs = counts.clone(), counts.clone()
        for one, where in ((module, ours), (naive, theirs)):
            one.add_tokens(where, rows, ids)
        check_equal(ours, theirs)

    return Case(
        calls=[lambda: module.add_tokens(counts, rows, ids)],
        check=check,
        num_bytes=rows.nbytes + ids.nbytes + 2 * rows.nbytes,
        peers={"plain torch": lambda: [lambda: naive.add_tokens(counts, rows, ids)]},
    )
