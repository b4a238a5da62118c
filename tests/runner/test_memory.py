from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.errors import ConfigError, KVCacheMemoryError
from streamserve.runner.available import available_cpu_memory
from streamserve.runner.memory import (
    GIB,
    MIB,
    AvailableMemory,
    format_bytes,
    parse_bytes,
    plan_memory,
)

KIB = 1024
DEFAULTS = {
    "available": AvailableMemory(32 * GIB, "MemAvailable"),
    "weight_bytes": 2 * GIB,
    "step_buffer_bytes": 64 * MIB,
    "kv_bytes_per_block": 192 * KIB,  # 12 KiB per token
    "block_size": 16,
    "max_model_len": 8192,
    "max_num_seqs": 64,
}


def plan(**changes):
    return plan_memory(**{**DEFAULTS, **changes})


@pytest.mark.parametrize(
    ("changes", "kv_bytes"),
    [
        ({}, 4 * GIB),  # at most 4 GiB by default
        ({"available": AvailableMemory(8 * GIB, "x")}, 2 * GIB),  # a quarter
        ({"max_num_seqs": 2}, 2 * 512 * 192 * KIB),  # all that can ever be used
        ({"max_num_seqs": 1, "max_model_len": 17}, 2 * 192 * KIB),
        (
            {"available": AvailableMemory(8 * GIB, "x"), "weight_bytes": 7 * GIB},
            1 * GIB - 64 * MIB,
        ),  # what is left
        ({"kv_cache_memory": 6 * GIB}, 6 * GIB),
        ({"kv_cache_memory": 200 * MIB + 1}, 1066 * 192 * KIB),  # whole blocks
        ({"use_all": True}, 30 * GIB - 64 * MIB),  # a GPU
    ],
)
def test_sizes(changes, kv_bytes):
    found = plan(**changes)
    assert found.num_blocks == kv_bytes // (192 * KIB)
    assert found.kv_bytes == found.num_blocks * 192 * KIB
    assert found.num_tokens == 16 * found.num_blocks


@pytest.mark.parametrize(
    ("changes", "num_slots", "total"),
    [
        ({}, 113, 4 * GIB),  # half of it
        # All that can be used: two for each seat, and the tokens of both.
        ({"max_num_seqs": 2}, 4, 4 * 18 * MIB + 2 * 512 * 192 * KIB),
        ({"kv_cache_memory": 120 * MIB}, 1, 120 * MIB),  # one at least
        ({"use_all": True}, 128, 30 * GIB - 64 * MIB),
        # With drafts as many more as one request has, and for one the least, and a kept state.
        ({"max_num_seqs": 2, "num_drafts": 3}, 7, 7 * 18 * MIB + 2 * 512 * 192 * KIB),
        ({"kv_cache_memory": 420 * MIB, "num_drafts": 3, "max_model_len": 256}, 5, 420 * MIB),
    ],
)
def test_states_take_a_part_of_the_cache(changes, num_slots, total):
    changes = {"max_model_len": 8192 if "max_num_seqs" in changes else 4096, **changes}
    per_state = 70 * MIB if "kv_cache_memory" in changes else 18 * MIB
    found = plan(state_bytes=per_state, **changes)
    assert found.num_state_slots == num_slots
    assert found.state_bytes == num_slots * per_state
    assert found.num_blocks == (total - found.state_bytes) // (192 * KIB)
    assert f"states        {num_slots} of {per_state // MIB}.0 MiB, " in found.describe()


def test_without_states_nothing_is_said_of_them():
    assert plan().num_state_slots == 0
    assert "states" not in plan().describe()


@pytest.mark.parametrize(
    ("per_state", "num_drafts", "proposed"),
    [
        (18 * MIB, 0, 192),
        (300 * MIB, 0, 396),
        (KIB, 0, 97),
        (18 * MIB, 4, 204),
        (300 * MIB, 4, 1896),
    ],
)
def test_what_is_proposed_beside_states_is_accepted(per_state, num_drafts, proposed):
    sizes = {"state_bytes": per_state, "num_drafts": num_drafts}
    with pytest.raises(KVCacheMemoryError, match=f"raise --kv-cache-memory to {proposed}MiB"):
        plan(kv_cache_memory=50 * MIB, **sizes)
    found = plan(kv_cache_memory=proposed * MIB, **sizes)
    assert found.num_tokens >= 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_cache_memory": 50 * MIB},
            "holds 4256 tokens, fewer than one sequence of --max-model-len 8192: lower "
            "--max-model-len to 4256 or raise --kv-cache-memory to 96MiB",
        ),
        (
            {"kv_cache_memory": 1000},
            "holds 0 tokens, fewer than one sequence of --max-model-len 8192: raise "
            "--kv-cache-memory to 96MiB",
        ),
        (
            {"kv_cache_memory": 31 * GIB},
            "weights 2.0 GiB + step buffers 64.0 MiB + KV cache 31.0 GiB; available: 32.0 GiB "
            "(MemAvailable). Lower --kv-cache-memory to 30656MiB or less",
        ),
        (
            {"weight_bytes": 40 * GIB},
            "weights 40.0 GiB + step buffers 64.0 MiB + KV cache 0 bytes; available: 32.0 GiB "
            "(MemAvailable). A smaller model or dtype, or more memory, is needed",
        ),
        (
            {"weight_bytes": 40 * GIB, "kv_cache_memory": GIB},
            "weights 40.0 GiB + step buffers 64.0 MiB + KV cache 1.0 GiB; available: 32.0 GiB",
        ),
        ({"max_model_len": 1_000_000}, "lower --max-model-len to 349520 or raise"),
        (  # a larger cache would not fit either
            {"available": AvailableMemory(128 * MIB, "x"), "weight_bytes": 0},
            "lower --max-model-len to 2720 or free memory (64.0 MiB are left for the cache, 96.0 "
            "MiB are needed). ",
        ),
    ],
)
def test_refusals_carry_the_numbers(changes, message):
    with pytest.raises(KVCacheMemoryError) as error:
        plan(**changes)
    assert message in str(error.value)


def test_what_a_refusal_proposes_is_accepted():
    assert plan(kv_cache_memory=50 * MIB, max_model_len=4256).num_blocks == 266
    assert plan(kv_cache_memory=parse_bytes("96MiB")).num_tokens == 8192
    assert plan(kv_cache_memory=parse_bytes("30656MiB")).num_blocks == 163_498


@given(
    gib=st.integers(1, 64),
    weights=st.integers(0, 32 * GIB),
    seqs=st.integers(1, 300),
    length=st.integers(2, 40_000),
    block_size=st.sampled_from([1, 8, 16, 32]),
    requested=st.none() | st.integers(1, 40 * GIB),
    per_state=st.sampled_from([0, 0, MIB, 150 * MIB]),
    num_drafts=st.sampled_from([0, 3]),
)
def test_a_plan_always_fits_and_holds_one_sequence(
    gib, weights, seqs, length, block_size, requested, per_state, num_drafts
):
    try:
        found = plan(
            available=AvailableMemory(gib * GIB, "x"),
            weight_bytes=weights,
            max_num_seqs=seqs,
            max_model_len=length,
            block_size=block_size,
            kv_cache_memory=requested,
            state_bytes=per_state,
            num_drafts=num_drafts,
        )
    except KVCacheMemoryError:
        return
    cache_bytes = found.kv_bytes + found.state_bytes
    assert found.weight_bytes + found.step_buffer_bytes + cache_bytes <= gib * GIB
    assert (found.num_state_slots > 0) == (per_state > 0)
    assert found.num_state_slots >= 2 + num_drafts or not (per_state and num_drafts)
    assert found.num_tokens >= length
    for chats, tokens in found.chats():
        assert 1 <= chats <= seqs
        assert tokens <= length
        assert chats * -(-tokens // block_size) <= found.num_blocks
    assert len(found.describe().splitlines()) == 5 + (per_state > 0)


def test_what_a_person_reads():
    assert plan().describe().splitlines() == [
        "available     32.0 GiB (MemAvailable)",
        "weights       2.0 GiB",
        "step buffers  64.0 MiB",
        "KV blocks     21,845 of 16 tokens, 4.0 GiB (12.0 KiB per token)",
        "tokens        349,520 fit: 64 chats of 5,456, or 42 chats of 8,192 tokens",
    ]
    assert plan(max_num_seqs=1).describe().endswith("8,192 fit: 1 chat of 8,192 tokens")
    few = plan(kv_cache_memory=96 * MIB)
    assert few.describe().endswith("64 chats of 128, or 1 chat of 8,192 tokens")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * GIB),
        ("512MiB", 512 * MIB),
        ("2G", 2 * GIB),
        ("1.5g", 3 * GIB // 2),
        (" 64 KiB ", 65536),
        ("2GB", 2 * 10**9),
        ("1tib", 1024 * GIB),
        ("1048576", MIB),
        ("7b", 7),
        ("3k", 3072),
    ],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "4 gigs", "-1G", "4GiBB", "1e9", "4PiB", "0", "4iB", "0.0001k", "٣G x"]
)
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="a size must"):
        parse_bytes(text)


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1.5 * MIB, 40 * GIB)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.5 MiB",
        "40.0 GiB",
    ]


MEMINFO = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"


def files(**groups):
    """A reader of made-up files: cgroup paths to (limit, usage, inactive)."""
    found = {"/proc/meminfo": MEMINFO}
    found.update(groups)
    return found.get


@pytest.mark.parametrize(
    ("found", "expected", "source"),
    [
        ({}, 8 * GIB, "MemAvailable"),
        ({"/proc/self/cgroup": "0::/\n"}, 8 * GIB, "MemAvailable"),
        (  # version 2, no limit
            {
                "/proc/self/cgroup": "0::/a\n",
                "/sys/fs/cgroup/a/memory.max": "max\n",
                "/sys/fs/cgroup/a/memory.current": "1000\n",
            },
            8 * GIB,
            "MemAvailable",
        ),
        (  # version 2; the file cache can be taken back
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max": f"{4 * GIB}\n",
                "/sys/fs/cgroup/a/b/memory.current": f"{3 * GIB}\n",
                "/sys/fs/cgroup/a/b/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2 * GIB,
            "the rest of the limit of /sys/fs/cgroup/a/b",
        ),
        (  # the parent's limit is tighter
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max": "max\n",
                "/sys/fs/cgroup/a/b/memory.current": "5\n",
                "/sys/fs/cgroup/a/memory.max": f"{GIB}\n",
                "/sys/fs/cgroup/a/memory.current": "24\n",
            },
            GIB - 24,
            "the rest of the limit of /sys/fs/cgroup/a",
        ),
        (  # in a container: the host's path, the container's own mount
            {
                "/proc/self/cgroup": "0::/docker/abc\n",
                "/sys/fs/cgroup/memory.max": f"{GIB}\n",
                "/sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
            },
            0,
            "the rest of the limit of /sys/fs/cgroup",
        ),
        (  # version 1
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{2 * GIB}\n",
                "/sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{GIB}\n",
                "/sys/fs/cgroup/memory/x/memory.stat": f"cache 1\ntotal_inactive_file {MIB}\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
            },
            GIB + MIB,
            "the rest of the limit of /sys/fs/cgroup/memory/x",
        ),
    ],
    ids=["none", "root", "no-limit", "v2", "parent", "container", "v1"],
)
def test_available_memory(found, expected, source):
    assert available_cpu_memory(files(**found)) == AvailableMemory(expected, source)


def test_available_memory_of_this_machine():
    psutil = pytest.importorskip("psutil")
    found = available_cpu_memory()
    assert 0 < found.num_bytes <= psutil.virtual_memory().total


def test_no_meminfo_is_said():
    with pytest.raises(KVCacheMemoryError, match="/proc/meminfo"):
        available_cpu_memory(lambda path: None)
