"""Shared by the engine's tests."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """An idle engine collects garbage: without what the test session has imported, in no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
