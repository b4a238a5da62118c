"""streamserve: a low-latency streaming chat server for open-weight language models."""

__version__ = "0.1.0"

__all__ = ["__version__"]
