"""The compiled library behind this backend: found, checked against this CPU, declared for ctypes.

The same sources are built several times, for CPUs of more and of fewer instructions, when the
project is installed (see ``setup.py``) where there is a C compiler. In a checkout,
``python setup.py build_ext --inplace`` builds them beside this file.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

# Changes with every change of a structure or of an operation's arguments.
ABI = 19
MAX_ARGS = 24
MAX_PLANS = 4  # SS_MAX_PLANS
# In the order of program.c.
OPERATIONS = (
    "embedding",
    "gather_rows",
    "rms_norm",
    "layer_norm",
    "rotary_write",
    "gated",
    "activation",
    "add",
    "scale",
    "linear",
    "argmax",
    "attend",
    "attend_merge",
    "copy_blocks",
    "quantise",
    "linear_quant",
    "embedding_quant",
    "pack_quant",
    "stored_sums",
    "stored_linear",
    "stored_pack",
    "stored_rows",
    "gather_inputs",
    "table_linear",
    "adapt_down",
    "adapt_up",
    "route",
    "order_pairs",
    "gather_pairs",
    "experts",
    "combine_pairs",
    "add_shared",
    "draw",
    "top_logits",
    "causal_conv",
    "delta_scales",
    "delta_rule",
    "gated_norm",
    "sigmoid_gate",
    "state_space_times",
    "state_space",
    "norm_of_gated",
    "multiply",
    "by_head",
)
# In the order of elementwise.c.
ACTIVATION_CODES = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "gelu_new": 2,
    "gelu_fast": 2,
    "quick_gelu": 3,
    "relu": 4,
    "relu2": 5,
}
GATED_CODES = {**ACTIVATION_CODES, "clamped_swiglu": 6}
_AVX2 = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vnni"}
# The builds and the flags of /proc/cpuinfo that each needs, the fastest first.
BUILDS = {
    "v4_bf16": _AVX512 | {"avx512_bf16"},
    "v4": _AVX512,
    "v3": _AVX2,
}


class PackedInstruction(ctypes.Structure):
    """``ss_instruction``."""

    _fields_ = (("op", ctypes.c_int64), ("args", ctypes.c_int64 * MAX_ARGS))


class Step(ctypes.Structure):
    """``ss_step``: sizes, then addresses."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "num_tokens",
            "num_logits",
            "num_requests",
            "table_stride",
            "input_ids",
            "positions",
            "slot_mapping",
            "logits_indices",
            "query_start_loc",
            "seq_lens",
            "block_table",
            "num_groups",
            "group_members",
            "group_starts",
            "group_blocks",
            "wants_logits",
            "state_slots",
            "state_saves",
        )
    )


def library_path(build: str) -> Path:
    """Where a build lies if it was made."""
    return Path(__file__).with_name(f"_native_{build}{sysconfig.get_config_var('EXT_SUFFIX')}")


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return frozenset()
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return frozenset(flags[1].split() if flags else ())


def has_matrix_units() -> bool:
    """Whether oneDNN multiplies bfloat16 on matrix units (AMX), which these kernels do not use."""
    return "amx_bf16" in _cpu_flags()


def runnable_builds() -> tuple[str, ...]:
    """The builds whose instructions this CPU has, the fastest first."""
    return tuple(build for build, needed in BUILDS.items() if needed <= _cpu_flags())


def why_not() -> str | None:
    """Why this backend cannot serve here, in a few words, or None if it can."""
    builds = runnable_builds()
    if not builds:
        missing = list(BUILDS.values())[-1] - _cpu_flags()
        return f"this CPU has no {', '.join(sorted(missing))}"
    path = library_path(builds[0])
    if not path.exists():
        return "it was not built (no C compiler at installation?)"
    if load_library() is None:
        return f"{path.name} was built from other sources: build it again"
    return None


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | None:
    """The best build that runs here, its functions declared; None if it is not of these sources."""
    try:
        library = ctypes.CDLL(str(library_path(runnable_builds()[0])))
        if library.ss_abi() != ABI:
            return None
    except (OSError, AttributeError):  # a file that is not ours, or none at all
        return None
    pointer = ctypes.c_void_p
    library.ss_program_new.argtypes = [pointer, ctypes.c_int64, pointer, ctypes.c_int64]
    library.ss_program_new.restype = pointer
    library.ss_program_free.argtypes = [pointer]
    library.ss_program_free.restype = None
    library.ss_run.argtypes = [pointer, pointer, ctypes.c_int, pointer, pointer]
    library.ss_run.restype = ctypes.c_int
    return library
