"""Flags whose default or effect depends on the device; no device is needed to say what they are."""

from __future__ import annotations

import pytest

from streamserve.cli.args import check_flags, parse_args
from streamserve.cli.device_flags import resolve_device_flags
from streamserve.errors import ConfigError


def resolve(*flags, on_gpu):
    warnings: list[str] = []
    args = parse_args(["serve", *flags])
    check_flags(args)
    resolved = resolve_device_flags(args, on_gpu=on_gpu, warn=warnings.append)
    return args, resolved, warnings


@pytest.mark.parametrize("command", ["serve", "chat"])
@pytest.mark.parametrize(
    ("on_gpu", "seqs", "tokens", "block_size", "utilization"),
    [(False, 64, 512, 16, None), (True, 256, 8192, 64, 0.9)],
)
def test_defaults_are_the_devices(command, on_gpu, seqs, tokens, block_size, utilization):
    args = parse_args([command])
    resolved = resolve_device_flags(args, on_gpu=on_gpu, warn=pytest.fail)
    assert resolved.max_num_seqs == seqs
    assert resolved.max_num_batched_tokens == tokens
    assert resolved.block_size == block_size
    assert resolved.gpu_memory_utilization == utilization
    assert args.max_num_seqs is None


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_was_given_stays(on_gpu):
    flags = ["--max-num-seqs", "3", "--max-num-batched-tokens", "77", "--block-size", "64"]
    _, resolved, warnings = resolve(*flags, on_gpu=on_gpu)
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens) == (3, 77)
    assert resolved.block_size == 64
    assert warnings == []


GPU_FLAGS = [
    "--gpu-memory-utilization=0.5",
    "--enforce-eager",
    "--kv-cache-dtype=fp8",
    "--kv-cache-memory=2GiB",
    '--speculative-config={"method": "ngram", "num_speculative_tokens": 2}',
]


def test_a_gpu_takes_all_of_them_in_silence():
    _, resolved, warnings = resolve(*GPU_FLAGS, on_gpu=True)
    assert resolved.gpu_memory_utilization == 0.5
    assert resolved.enforce_eager
    assert warnings == []


def test_a_cpu_says_what_it_does_not_look_at():
    flags = ["--gpu-memory-utilization=0.5", "--enforce-eager", "--kv-cache-memory=2GiB"]
    more = ["--cuda-graph-sizes", "1", "2", "--swap-space", "4"]
    _, _, warnings = resolve(*flags, *more, on_gpu=False)
    assert warnings == [
        "--gpu-memory-utilization has no effect on a CPU; --kv-cache-memory sizes the cache",
        "--enforce-eager has no effect on a CPU",
        "--cuda-graph-sizes has no effect on a CPU",
        "--swap-space has no effect on a CPU: the KV cache is in host memory already; "
        "--kv-cache-memory makes it larger",
    ]


@pytest.mark.parametrize(
    ("flags", "on_gpu", "message"),
    [
        (["--kv-cache-dtype", "fp8"], False, "must be auto on a CPU .* got 'fp8'"),
        (
            ["--cuda-graph-sizes", "1", "300"],
            True,
            r"must be at most --max-num-seqs 256 .* got 300",
        ),
        (["--cuda-graph-sizes", "1", "--enforce-eager"], True, "must not be given with"),
        (
            ["--swap-space", "4GiB", "--no-enable-prefix-caching"],
            True,
            "--swap-space must not be given with --no-enable-prefix-caching .* got '4GiB'",
        ),
    ],
)
def test_what_cannot_be_is_refused(flags, on_gpu, message):
    with pytest.raises(ConfigError, match=message):
        resolve(*flags, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("given", "size"), [("4", "4GiB"), ("0.5", "0.5GiB"), ("512MiB", "512MiB"), ("0", None)]
)
def test_swap_space_is_a_size_or_as_in_vllm_a_number_of_gibibytes(given, size):
    assert parse_args(["serve", "--swap-space", given]).swap_space == size


@pytest.mark.parametrize("value", ["0", "-0.1", "1.01"])
def test_a_share_that_is_none(value):
    with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
        check_flags(parse_args(["serve", "--gpu-memory-utilization", value]))
