"""Compiles the Triton kernels for a GPU that is not there: every launch becomes a compilation.

A program of its own (`python -m tests.kernels.absent_gpu`), since the interpreter, once asked for,
is the process's. Prints a JSON line for each compiled kernel; exits with 1 if something did not
compile. ptxas, which the triton package brings along, does the last step: what it says of registers
and spills is what the device will get. All code is disassembled at once, since the tool's start
takes twenty times as long as a kernel.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CAPABILITY = 90  # Hopper
HEADS, KV_HEADS, SIZE, HIDDEN, INTERMEDIATE, VOCAB = 32, 8, 128, 4096, 14336, 128256
BLOCK_SIZE = 32
LATENT, ROTARY = 512, 64


class AbsentGpu:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install(compiled: list[tuple[dict[str, Any], Any]]) -> None:
    """Appends to ``compiled`` what is known of each kernel, and the kernel."""
    assert not triton.knobs.runtime.interpret
    triton.runtime.driver.set_active(AbsentGpu())
    importlib.import_module("streamserve_kernels.triton")
    for name, module in tuple(sys.modules.items()):
        if name.startswith("streamserve_kernels.triton.") and hasattr(module, "overlaps"):
            # Tensors lie on the CPU; who asks their device should hear of the absent one.
            module.overlaps = lambda device: True  # type: ignore[attr-defined]
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before = num_compiled(self)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if num_compiled(self) > before:
            found = {
                "launch_pdl": bool(options.get("launch_pdl")),
                "waits_for_grid": "griddepcontrol.wait" in kernel.asm["ptx"],
                "programs": math.prod(grid),
            }
            compiled.append(({"kernel": self._fn_name, **found, **resources(kernel)}, kernel))
        return kernel

    JITFunction.run = compile_only


def num_compiled(kernel: Any) -> int:
    return sum(len(of_device[0]) for of_device in kernel.device_caches.values())


def said_of(image: bytes, tool: str, *flags: str) -> str:
    """What one of the tools that triton brings along says."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile() as file:
        file.write(image)
        file.flush()
        command = [path, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (spills), shared bytes of a program.

    `limited`: the launch asks for fewer registers than a thread can have.
    """
    told = said_of(kernel.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    used = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return {
        "registers": int(used["REG"]),
        "stack": int(used["STACK"]),
        "shared": kernel.metadata.shared,
        "limited": kernel.metadata.maxnreg is not None,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
    }


def instructions(cubin: bytes) -> bytes:
    """The sections of an ELF file that are executed."""
    (first,), (count,) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<H", cubin, 60)
    code = b""
    for section in range(count):
        _, _, flags, _, start, size = struct.unpack_from("<IIQQQQ", cubin, first + 64 * section)
        if flags & 4:
            code += cubin[start : start + size]
    return code


def disassembled(kernels: list[Any]) -> list[str]:
    """The code of each, a line for an instruction."""
    codes = [instructions(kernel.asm["cubin"]) for kernel in kernels]
    told = said_of(b"".join(codes), "nvdisasm", "--binary", f"SM{CAPABILITY}a")
    lines = iter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/.*", told, re.MULTILINE))
    # Each instruction is 16 bytes.
    return ["\n".join(islice(lines, len(code) // 16)) for code in codes]


def pace(code: str) -> dict[str, int]:
    """What holds up the matrix units: products waited for, operands sent through shared memory."""
    loop = code[code.index("HGMMA") : code.rindex("HGMMA")]
    return {"waits": loop.count("WARPGROUP.DEPBAR.LE gsb0, 0x0"), "through": code.count("LDSM")}


def accesses(code: str) -> dict[str, int]:
    """Its loads and stores of 16 bytes, those of fewer, and the loads before it waits."""
    found = re.findall(r"\b(?:LDG|STG)\.E\S*", code)
    wide = sum(access.endswith(".128") for access in found)
    early = code[: code.index("ACQBULK")].count("LDG.E")
    return {"wide": wide, "narrow": len(found) - wide, "early": early}


def conversions(code: str) -> dict[str, int]:
    """Those at a quarter of the rate that packed ones have."""
    return {"slow_conversions": code.count("F2F.")}


def asked_of(name: str, found: dict[str, Any]) -> list[Callable[[str], dict[str, int]]]:
    """What its code is looked into for."""
    of_name = {
        "_heads_kernel": accesses,
        "attention_kernel": conversions,
        "delta_kernel": accesses,
        "state_space_kernel": accesses,
    }
    return [*([pace] if found["wgmma"] else []), *([of_name[name]] if name in of_name else [])]


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def elementwise_calls() -> Iterator[Callable[[], object]]:
    from streamserve_kernels import triton as ours

    for rows in (1, 64):
        x, weight = bf16(rows, HIDDEN), bf16(HIDDEN)
        yield lambda x=x, weight=weight: ours.rms_norm(x, weight, 1e-5)
        yield lambda x=x, weight=weight: ours.rms_norm(x, weight, 1e-5, x, 1.0)
        yield lambda x=x, weight=weight: ours.layer_norm(x, weight, weight, 1e-5, x)
        yield lambda x=x: ours.gated_activation(x, "silu")
        yield lambda x=x: ours.activation(x, "gelu")
        ids = ints(rows, dtype=torch.int64)
        yield lambda x=x, ids=ids: ours.embedding(ids, x)
        yield lambda ids=ids: ours.resolve_tokens(ids, ids)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        caches = [bf16(4, KV_HEADS, BLOCK_SIZE, SIZE).to(dtype) for _ in range(2)]
        for tokens in (1, 128):
            qkv = bf16(tokens, (HEADS + 2 * KV_HEADS) * SIZE).view(tokens, -1, SIZE)
            q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
            at, angles = ints(tokens, dtype=torch.int64), torch.zeros(16, SIZE)
            yield lambda q=q, k=k, v=v, at=at, angles=angles, caches=caches: ours.rotary_write_kv(
                q, k, v, at, angles, *caches, at, interleaved=False
            )
        one = ints(1, dtype=torch.int64)
        yield lambda caches=caches, one=one: ours.copy_blocks(caches, one, one)


def linear_calls() -> Iterator[Callable[[], object]]:
    from streamserve_kernels.triton.linear import prepare_linear, prepare_quantised
    from streamserve_kernels.triton.stored import prepare_stored
    from tests.kernels.stored_cases import CASES

    weight = bf16(512, HIDDEN)
    layers: list[Any] = [prepare_linear(weight, None)]
    layers += [prepare_quantised(weight, None, kind) for kind in ("int8", "int4", "fp8")]
    for case in ("gptq4", "gptq3", "q4_k", "q6_k", "nf4", "squeezed3", "fp8-blocks"):
        layers.append(prepare_stored(CASES[case](512, HIDDEN), None, torch.bfloat16))
    calls = [(layer, rows) for layer in layers for rows in (1, 8, 32, 64, 128)]
    zero_per_row = prepare_stored(CASES["gptq4-rows"](512, HIDDEN), None, torch.bfloat16)
    for layer, rows in (*calls, (zero_per_row, 64)):
        for config in layer.candidates(rows):
            # With 32 rows, tiles that are not split are half of those with 64.
            if rows != 32 or config.kernel == "split":
                yield lambda layer=layer, rows=rows, config=config: layer.run(
                    bf16(rows, HIDDEN), config
                )


def adapter_calls() -> Iterator[Callable[[], object]]:
    import numpy as np

    from streamserve_kernels import triton as ours
    from streamserve_kernels.adapters import AdapterRows

    cpu = torch.device("cpu")
    for rank, dtype in ((16, torch.bfloat16), (48, torch.bfloat16), (256, torch.float)):
        table = ours.AdapterTable(4, 1024, HIDDEN, dtype, cpu, rank)
        for rows in (1, 64, 1024):
            x, y = bf16(rows, HIDDEN).to(dtype), bf16(rows, 1024).to(dtype)
            mine = AdapterRows.of(np.zeros(rows, np.int32), cpu, 4)
            yield lambda x=x, y=y, table=table, mine=mine: ours.add_adapters(y, x, table, mine)


def moe_calls() -> Iterator[Callable[[], object]]:
    from streamserve_kernels import triton as ours
    from streamserve_kernels.routing import Routing
    from streamserve_kernels.triton.moe import _route
    from tests.kernels.routings import EXPERTS, ROUTINGS

    for routing in ROUTINGS.values():
        yield lambda routing=routing: _route(bf16(4, EXPERTS), routing)
    num_experts = 8
    for hidden, inner, with_bias, dtype in (
        (HIDDEN, 1024, False, torch.bfloat16),
        (HIDDEN, 1024, True, torch.bfloat16),
        (HIDDEN, 1024, False, torch.float),
        (52, 100, False, torch.bfloat16),  # rows at odd addresses
    ):
        shapes = (2 * inner, hidden), (hidden, inner)
        gate_up, down = (
            [
                ours.prepare_linear(bf16(*shape).to(dtype), bf16(shape[0]) if with_bias else None)
                for _ in range(num_experts)
            ]
            for shape in shapes
        )
        for tokens in (1, 32, 256, 1024):
            x, logits = bf16(tokens, hidden).to(dtype), bf16(tokens, num_experts).to(dtype)
            args = x, logits, gate_up, down
            yield lambda args=args: ours.moe(*args, Routing(2, True), "silu")
        for tokens in (1, 256):
            x, chosen = bf16(tokens, hidden).to(dtype), torch.zeros(tokens, 2, dtype=torch.int64)
            args = (
                x,
                chosen,
                bf16(tokens, 2).to(dtype),
                gate_up,
                down,
                lambda h, inner=inner: h[:, :inner],
            )
            yield lambda args=args: ours.chosen_experts(*args)


def sampling_calls() -> Iterator[Callable[[], object]]:
    from streamserve_kernels.sampling import LogitsEditTensors, SamplingTensors
    from streamserve_kernels.triton import sampling

    rows = 64
    floats, doubles = torch.zeros(rows), torch.zeros(rows).double()
    edits = LogitsEditTensors(
        rows=ints(rows),
        counts=ints(rows, VOCAB),
        repetition=floats,
        presence=floats,
        frequency=floats,
        bias_start=ints(rows + 1),
        bias_ids=ints(4),
        bias_values=torch.zeros(4),
        mask_rows=ints(rows),
        masks=ints(1, -(-VOCAB // 32)),
    )
    drafted = edits._replace(drafts=ints(rows), num_before=ints(rows))
    asked = SamplingTensors(floats, ints(rows), doubles, floats, doubles)
    ids = ints(rows, dtype=torch.int64)
    for logits in (torch.zeros(rows, VOCAB), bf16(rows, VOCAB)):
        yield partial(sampling.greedy, logits)
        yield partial(sampling.sample, logits, asked)
        yield partial(sampling.sample, logits, asked, edits)
        yield partial(sampling.sample, logits, asked, drafted)
        yield partial(sampling.logprobs, logits, ids, 20)
    yield lambda: sampling.add_tokens(edits.counts, edits.rows, ids)
    yield lambda: sampling.add_tokens(edits.counts, edits.rows, ids, *drafted[-2:])


def attention_calls() -> Iterator[Callable[[], object]]:
    from streamserve_kernels import PrefixGroups
    from streamserve_kernels.triton.attention import paged_attention

    width = 64
    for kv_heads, size, block_size, dtype, more in (
        (KV_HEADS, SIZE, BLOCK_SIZE, torch.bfloat16, {}),
        (KV_HEADS, SIZE, 64, torch.bfloat16, {}),
        (KV_HEADS, SIZE, 16, torch.float8_e4m3fn, {}),
        (HEADS, 80, 16, torch.bfloat16, {"window": 100}),
        (1, 256, 32, torch.bfloat16, {"soft_cap": 30.0}),
        (KV_HEADS, 64, 32, torch.bfloat16, {"alibi_slopes": torch.zeros(HEADS)}),
        (KV_HEADS, SIZE, BLOCK_SIZE, torch.float32, {}),
        (1, LATENT + ROTARY, BLOCK_SIZE, torch.bfloat16, {}),
    ):
        of_query = torch.float32 if dtype == torch.float32 else torch.bfloat16
        sizes = (size, LATENT if size > LATENT else size)
        caches = [bf16(4, kv_heads, block_size, held).to(dtype) for held in sizes]
        for tokens, requests, longest, groups in (
            (1, 1, 1, False),
            (64, 64, 1, False),
            (64, 64, 1, True),
            (512, 16, 512, False),
            (512, 16, 512, True),
        ):
            if groups and "window" in more:
                continue
            if dtype == torch.float32 and not groups:
                continue
            if size > LATENT and (tokens, groups) not in ((64, False), (512, True)):
                continue
            members = requests, requests // 2 + 1, requests // 2
            shared = PrefixGroups(*(ints(n) for n in members)) if groups else None
            query = bf16(tokens, HEADS, size).to(of_query)
            args = query, *caches, ints(requests, width), ints(requests)
            yield (
                lambda args=args, requests=requests, longest=longest, shared=shared, more=more: (
                    paged_attention(
                        *args,
                        ints(requests + 1),
                        scale=0.1,
                        prefix_groups=shared,
                        max_query_len=longest,
                        **more,
                    )
                )
            )


def block_rows_calls() -> Iterator[Callable[[], object]]:
    from streamserve_kernels.triton.block_rows import TritonBlockRows

    blocks = TritonBlockRows([bf16(4, KV_HEADS, BLOCK_SIZE, SIZE) for _ in range(4)])
    rows = torch.zeros(2, blocks.width, dtype=torch.int64)
    ids = ints(2, dtype=torch.int64)
    yield lambda: blocks.pack(ids, rows)
    yield lambda: blocks.unpack(rows, ids)


def recurrent_calls() -> Iterator[Callable[[], object]]:
    """Of Qwen3-Next 80B: 16 key heads and 32 value heads of 128, a convolution of 4 tokens."""
    from streamserve_kernels import triton as ours
    from streamserve_kernels.recurrent import StepStates

    keys, heads, size, width = 16, 32, 128, 4
    channels = (2 * keys + heads) * size
    weight, norm, wide = bf16(channels, width), bf16(size), bf16(heads * size)
    conv_states, states = bf16(4, width - 1, channels), torch.zeros(4, heads, size, size)
    rates = torch.zeros(heads), torch.zeros(heads)
    for tokens, requests in ((1, 1), (64, 64), (512, 16)):
        where = StepStates(ints(requests), ints(tokens)), ints(requests + 1), ints(requests)
        x, gates = bf16(tokens, channels), bf16(tokens, 2 * heads)
        yield lambda x=x, where=where: ours.causal_conv(
            x, weight, None, conv_states, *where, activation="silu"
        )
        yield lambda x=x, gates=gates, where=where: ours.gated_delta_rule(
            x, gates, *rates, states, *where, num_key_heads=keys
        )
        attended = bf16(tokens, heads * size)
        yield lambda x=attended: ours.gated_rms_norm(x, x, norm, 1e-6)
        yield lambda x=attended: ours.norm_of_gated(x, x, wide, 1e-6, heads * size)
        yield lambda x=attended: ours.sigmoid_gate(x, x)
        # of Mamba 2
        dt = bf16(tokens, heads)
        yield lambda x=x, dt=dt, where=where: ours.state_space_scan(
            x, dt, *rates, rates[0], states, *where, num_groups=keys
        )


PARTS = {
    "elementwise": elementwise_calls,
    "linear": linear_calls,
    "adapters": adapter_calls,
    "moe": moe_calls,
    "sampling": sampling_calls,
    "attention": attention_calls,
    "block rows": block_rows_calls,
    "recurrent": recurrent_calls,
}


def main(parts: list[str]) -> int:
    compiled: list[tuple[dict[str, Any], Any]] = []
    install(compiled)
    failures = 0
    for part in parts or PARTS:
        begin = len(compiled)
        for call in PARTS[part]():
            try:
                call()
            except Exception:
                failures += 1
                traceback.print_exc(limit=-4)
        for found, _ in compiled[begin:]:
            found["part"] = part
    looked_into = [
        (questions, found, kernel)
        for found, kernel in compiled
        if (questions := asked_of(kernel.metadata.name, found))
    ]
    codes = disassembled([kernel for _, _, kernel in looked_into])
    for (questions, found, _), code in zip(looked_into, codes, strict=True):
        for question in questions:
            found.update(question(code))
    for found, _ in compiled:
        print(json.dumps(found))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
