"""Rows of a mixture of experts, in the shape of Mixtral: eight, of which a token chooses two."""

from __future__ import annotations

from functools import lru_cache, partial

from torch import Tensor

from device_bench.peers import naive_peer
from device_bench.row import Bench, Case, Row, check_close, tolerance
from device_bench.timing import Call
from streamserve_kernels import Kernels, PackedLinear, Quantization
from streamserve_kernels.routing import Routing

_EXPERTS = 8
_TOP_K = 2


def rows(quick: bool) -> list[Row]:
    made = [
        Row("experts", f"{_TOP_K} of {_EXPERTS}, {count} rows", partial(_build, count, None))
        for count in ((64,) if quick else (1, 8, 64, 2048))
    ]
    if not quick:
        name = f"{_TOP_K} of {_EXPERTS} in int4, 8 rows"
        made.append(Row("experts", name, partial(_build, 8, "int4")))
    return made


@lru_cache(maxsize=1)
def _weights(bench: Bench) -> tuple[Tensor, Tensor]:
    """[E, 2 * I, H] and [E, H, I]: gigabytes, so all rows and backends have the same."""
    hidden, inner = bench.sizes.hidden, bench.sizes.intermediate
    gate_up = bench.randn(_EXPERTS, 2 * inner, hidden).div_(hidden**0.5)
    return gate_up, bench.randn(_EXPERTS, hidden, inner).div_(inner**0.5)


def _build(rows: int, quantization: Quantization | None, bench: Bench) -> Case:
    count = max(1, bench.sizes.tokens(rows))
    hidden, inner = bench.sizes.hidden, bench.sizes.intermediate
    x, logits = bench.randn(count, hidden), bench.randn(count, _EXPERTS)
    nbytes: list[int] = []  # of an expert

    def make(kernels: Kernels) -> Call:
        def prepared(weight: Tensor) -> PackedLinear:
            if quantization is None:
                return kernels.prepare_linear(weight)
            return kernels.prepare_quantised(weight, None, quantization)

        gate_up, down = ([prepared(weight) for weight in both] for both in _weights(bench))
        nbytes.append(sum(one.nbytes for one in (gate_up[0], down[0])))
        return lambda: kernels.moe(x, logits, gate_up, down, Routing(_TOP_K, True), "silu")

    ours = make(bench.kernels)

    def check() -> None:
        check_close(ours(), make(bench.naive)(), tolerance(bench.dtype))

    chosen = logits.topk(_TOP_K, dim=-1).indices.unique().numel()
    weight = 3 * hidden * inner
    activations = count * (2 * hidden + 2 * _TOP_K * (inner + hidden))
    num_bytes = chosen * nbytes[0] + activations * bench.dtype.itemsize
    return Case(
        calls=[ours],  # its weights alone are more than the caches hold
        check=check,
        num_bytes=num_bytes,
        flops=2.0 * count * _TOP_K * weight,
        peers=naive_peer(bench, lambda: make(bench.naive), num_bytes),
    )
