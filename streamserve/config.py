"""Frozen configs, split by owner: each part receives its own and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from streamserve.errors import ConfigError

POLICIES = ("sjf", "fcfs", "priority", "fair")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The KV cache: ``num_blocks`` blocks of ``block_size`` tokens, in every layer.

    With ``num_host_blocks``, what leaves the device is kept in host memory. A step carries at most
    ``max_transfers_per_step`` blocks there, and as many back. ``num_state_slots``: for as many
    sequences there is room for what layers keep besides keys and values; 0 if they keep nothing.
    """

    num_blocks: int
    block_size: int = 16
    enable_prefix_caching: bool = True
    num_host_blocks: int = 0
    max_transfers_per_step: int = 32
    num_state_slots: int = 0

    def __post_init__(self) -> None:
        _at_least("num_blocks", self.num_blocks, 1)
        _at_least("block_size", self.block_size, 1)
        _at_least("num_host_blocks", self.num_host_blocks, 0)
        _at_least("max_transfers_per_step", self.max_transfers_per_step, 1)
        _at_least("num_state_slots", self.num_state_slots, 0)
        if self.num_host_blocks and self.num_state_slots:
            raise ConfigError(
                "num_host_blocks must be 0 for a model whose layers keep states (which stay on the"
                f" device), got {self.num_host_blocks}"
            )
        if self.num_host_blocks and not self.enable_prefix_caching:
            raise ConfigError(
                "num_host_blocks must be 0 without prefix caching (blocks are found there by their"
                f" prefix), got {self.num_host_blocks}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """LoRA adapters: how many may be loaded at a time, of which rank at most.

    ``modules`` are the names and directories of those that are there from the start.
    """

    num_adapters: int
    max_rank: int
    modules: tuple[tuple[str, Path], ...] = ()

    def __post_init__(self) -> None:
        _at_least("num_adapters", self.num_adapters, 1)
        _at_least("max_rank", self.max_rank, 1)


DraftMethod = Literal["ngram", "draft_model", "mtp", "eagle3"]

MAX_DRAFTING_ROWS = 64
"""Rows that a runner must be able to sample in one step, where drafts need so many."""

MAX_FORCED_TOKENS = 16
"""Of a request and step: drafts that a grammar leaves no choice about, whatever else drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Drafts by ``method``: prompt lookup (``ngram``), what followed the text's last tokens when
    they last occurred; a ``draft_model``; a head that is in the checkpoint (``mtp``); or a head
    that is a checkpoint of its own (``eagle3``).

    At most ``num_speculative_tokens`` for a request and step; the n-grams that are looked up have
    ``prompt_lookup_min`` to ``prompt_lookup_max`` tokens. ``model`` is a checkpoint, or a hub id.
    ``quantization`` is of what drafts, while it is loaded.
    """

    num_speculative_tokens: int
    method: DraftMethod = "ngram"
    prompt_lookup_min: int = 1
    prompt_lookup_max: int = 1
    model: str | None = None
    quantization: Literal["int8", "int4", "fp8"] | None = None

    def __post_init__(self) -> None:
        _at_least("num_speculative_tokens", self.num_speculative_tokens, 1)
        _at_least("prompt_lookup_min", self.prompt_lookup_min, 1)
        _at_least("prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """One step's budget and the order in which requests are served."""

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 1024
    max_num_waiting_tokens: int | None = None  # of prompts
    policy: str = "sjf"
    itl_target_ms: float | None = None  # between two tokens of a stream; None: from the decodes
    max_steps_in_flight: int = 1
    enable_cascade_attention: bool = True
    cascade_overhead_tokens: int = 32  # what splitting one request costs, in tokens of KV read
    speculative: SpeculativeConfig | None = None

    @property
    def max_num_sampled(self) -> int:
        """Rows that may be sampled in one step: one for each seat, and some for drafts.

        Speculation is for small batches: with many seats, drafts take what the requests leave.
        """
        most = MAX_FORCED_TOKENS
        if self.speculative is not None:
            most = max(most, self.speculative.num_speculative_tokens)
        rows = self.max_num_seqs * (1 + most)
        return max(self.max_num_seqs, min(rows, MAX_DRAFTING_ROWS))

    def __post_init__(self) -> None:
        _at_least("max_model_len", self.max_model_len, 2)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("max_num_waiting", self.max_num_waiting, 1)
        if self.max_num_waiting_tokens is not None:
            _at_least("max_num_waiting_tokens", self.max_num_waiting_tokens, 1)
        _at_least("max_steps_in_flight", self.max_steps_in_flight, 1)
        _at_least("cascade_overhead_tokens", self.cascade_overhead_tokens, 0)
        if self.itl_target_ms is not None and not 0.0 < self.itl_target_ms < float("inf"):
            raise ConfigError(f"itl_target_ms must be above 0, got {self.itl_target_ms}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")


POOLING_KINDS = ("last", "mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingConfig:
    """What a checkpoint says of its vectors of texts.

    They have ``size`` numbers (``None``: nobody knows). A shorter one is as good as it can be only
    where the model was trained for it: to one of the ``matryoshka`` sizes, or, ``True``, to any.
    """

    pooling: str = "last"
    size: int | None = None
    matryoshka: tuple[int, ...] | bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLING_KINDS:
            raise ConfigError(
                f"pooling must be one of {', '.join(POOLING_KINDS)}, got {self.pooling!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """HTTPS, as uvicorn takes it; ``cert_reqs`` is one of ``ssl.VerifyMode``."""

    certfile: str
    keyfile: str | None = None
    ca_certs: str | None = None
    cert_reqs: int = 0
    ciphers: str = "TLSv1"  # uvicorn's own default: what OpenSSL takes for sane


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """What a streamed answer may hold for a reader that is slow, and for how long.

    ``max_buffer_bytes`` is shared out: a half is the socket's ``SO_SNDBUF``, a quarter the
    transport's high-water mark, and a quarter text that waits for room there. Past that nothing
    more is generated. A reader that makes no room for ``stall_timeout_s`` gets an error.

    An answer that may be resumed is made, and what it said kept, until nobody has read it for
    ``resume_timeout_s``; ``max_replay_bytes`` of one, ``max_kept_bytes`` of all that have ended.
    """

    max_buffer_bytes: int = 128 * 2**10
    stall_timeout_s: float = 60.0
    resume_timeout_s: float = 60.0
    max_replay_bytes: int = 2**20
    max_kept_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        _at_least("max_buffer_bytes", self.max_buffer_bytes, 8 * 2**10)
        if self.stall_timeout_s <= 0:
            raise ConfigError(f"stall_timeout_s must be above 0, got {self.stall_timeout_s}")
        _at_least("max_replay_bytes", self.max_replay_bytes, 1024)
        if self.resume_timeout_s <= 0:
            raise ConfigError(f"resume_timeout_s must be above 0, got {self.resume_timeout_s}")

    @property
    def send_buffer_bytes(self) -> int:
        """Of the socket."""
        return self.max_buffer_bytes // 2

    @property
    def high_water_bytes(self) -> int:
        """Of the transport."""
        return self.max_buffer_bytes // 4

    @property
    def max_unread_bytes(self) -> int:
        """Of all choices' mailboxes together."""
        return self.max_buffer_bytes // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """The HTTP front."""

    served_model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    allowed_methods: tuple[str, ...] = ("GET", "POST", "DELETE")
    allowed_headers: tuple[str, ...] = ("*",)
    root_path: str = ""  # the prefix under which a proxy shows the server
    tls: TlsConfig | None = None
    uvicorn_log_level: str = "warning"
    response_role: str = "assistant"
    log_requests: bool = False
    max_logged_characters: int = 0  # of a prompt
    strict_fields: bool = False
    honours_priority: bool = False  # whether the scheduler's policy looks at it
    max_body_bytes: int = 16 * 2**20
    max_header_bytes: int = 64 * 2**10
    receive_timeout_s: float = 60.0  # of a request's headers and body
    keep_alive_timeout_s: float = 75.0  # of a connection between two requests
    max_connections: int = 4096
    ping_interval_s: float = 15.0
    drain_timeout_s: float = 30.0
    streams: StreamConfig = field(default_factory=StreamConfig)
    has_pages: bool = True
    has_docs: bool = True  # /docs, which is a page, and /openapi.json
    has_metrics: bool = True
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None  # where /metrics, /version and /debug are then, and only there
    hang_timeout_s: float = 60.0  # a step takes longer: /live says that the engine hangs
    updates_adapters: bool = False  # /v1/load_lora_adapter and /v1/unload_lora_adapter
    max_stored_responses: int = 1024
    stored_responses_memory_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ConfigError("served_model_names must hold at least one name, got none")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(
                f"root_path must begin with a slash and not end with one, got {self.root_path!r}"
            )
        for name, port in (("port", self.port), ("admin_port", self.admin_port)):
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(f"{name} must be between 0 and 65535, got {port}")
        _at_least("max_body_bytes", self.max_body_bytes, 1024)
        _at_least("max_stored_responses", self.max_stored_responses, 0)
        _at_least("stored_responses_memory_bytes", self.stored_responses_memory_bytes, 0)
        _at_least("max_header_bytes", self.max_header_bytes, 1024)
        _at_least("max_connections", self.max_connections, 1)
        for name in (
            "receive_timeout_s",
            "keep_alive_timeout_s",
            "hang_timeout_s",
            "ping_interval_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s must be at least 0, got {self.drain_timeout_s}")


def _at_least(name: str, value: int, limit: int) -> None:
    if value < limit:
        raise ConfigError(f"{name} must be at least {limit}, got {value}")


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What a checkpoint that is no directory holds of a text's files, read from ``source``.

    ``tokenizer`` is a ``tokenizer.json``, ``config`` what ``tokenizer_config.json`` would hold.
    """

    source: str
    tokenizer: str
    config: Mapping[str, Any]
    model_type: str | None = None
