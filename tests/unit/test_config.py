"""Configs are checked when they are made; a message names the field, the limit and the value."""

from dataclasses import FrozenInstanceError

import pytest

from streamserve.config import ApiConfig, CacheConfig, SchedulerConfig
from streamserve.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheConfig(num_blocks=0), "num_blocks must be at least 1, got 0"),
        (lambda: CacheConfig(num_blocks=1, block_size=0), "block_size must be at least 1, got 0"),
        (lambda: SchedulerConfig(max_model_len=1), "max_model_len must be at least 2, got 1"),
        (
            lambda: SchedulerConfig(max_model_len=9, max_num_seqs=0),
            "max_num_seqs must be at least 1, got 0",
        ),
        (
            lambda: SchedulerConfig(max_model_len=9, max_num_batched_tokens=-1),
            "max_num_batched_tokens must be at least 1, got -1",
        ),
        (
            lambda: SchedulerConfig(max_model_len=9, itl_target_ms=0.0),
            "itl_target_ms must be above 0, got 0.0",
        ),
        (
            lambda: SchedulerConfig(max_model_len=9, policy="lottery"),
            "policy must be one of sjf, fcfs, priority, fair, got 'lottery'",
        ),
        (
            lambda: SchedulerConfig(max_model_len=9, cascade_overhead_tokens=-1),
            "cascade_overhead_tokens must be at least 0, got -1",
        ),
        (lambda: ApiConfig(served_model_names=()), "served_model_names must hold at least one"),
        (
            lambda: ApiConfig(served_model_names=("m",), port=70000),
            "port must be between 0 and 65535, got 70000",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ConfigError) as info:
        make()
    assert message in str(info.value)


def test_frozen():
    config = CacheConfig(num_blocks=4)
    assert config.num_tokens == 64
    with pytest.raises(FrozenInstanceError):
        config.num_blocks = 5
