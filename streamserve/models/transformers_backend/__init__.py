"""Any model that transformers can build and that attends through its attention interface.

    config      the config, and refusals with a reason
    probe       one forward without weights: attention by layer, linear layers, what cannot be
    attention   what transformers calls where a model attends: our cache, our kernels
    loading     weights by transformers' loader, then packed for our kernels
    decoder     the interface to the runner, which is all that the rest of the server knows

The rest of `models` imports this package when a model is not one of its families, since it imports
transformers.
"""

from streamserve.models.transformers_backend.config import TransformersConfig, read_config

__all__ = ["TransformersConfig", "read_config"]
