"""What every backend offers: the contract between the models and the kernels.

A backend is a module (or any object) with these functions; mypy checks a module against a
protocol like any other object. Letters in shapes:

    T tokens in the step          Hq, Hkv  query and key/value heads    D, Dv  head sizes
    R requests in the step        B blocks in the cache                 S      tokens in a block
    M most blocks of one request  N, K     output and input features    E      experts
    G groups that share a prefix  P        members of all groups

Every function is called from one thread at a time (the device thread). Tensors may be views of a
fused projection: the last dimension is contiguous, the heads of one token are adjacent, and the
stride between tokens is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from streamserve_kernels import adapters
from streamserve_kernels.adapters import AdapterRows, StepAdapters
from streamserve_kernels.quantised import Quantization
from streamserve_kernels.recurrent import StepStates
from streamserve_kernels.routing import Routing
from streamserve_kernels.stored import StoredWeight

# Prompt attention pads its queries and keys to whole multiples and takes keys in segments. Warm-up
# must meet the shapes that come of it.
PROMPT_QUERY_MULTIPLE = 64
PROMPT_KEY_MULTIPLE = 128
PROMPT_KEY_SEGMENT = 4096

GatedKind = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]
ExpertKind = GatedKind | Literal["relu2"]
"""Of what experts make first; with `relu2` they have no gates, and make as much as they take."""
ActivationKind = Literal[
    "silu", "gelu", "gelu_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "relu2"
]


class PrefixGroups(NamedTuple):
    """Requests that share leading blocks: attention over those may be computed once for all.

    Members of a group have identical `block_table[m, :num_blocks[g]]`, and a request is in at most
    one group. For every member `num_blocks[g] * S <= seq_len - queries`: the shared part was there
    before the step, so every query of the step sees all of it.
    """

    members: Tensor  # [P] int32: requests (rows of block_table), group by group
    starts: Tensor  # [G + 1] int32: where each group's members start in `members`
    num_blocks: Tensor  # [G] int32: leading blocks that all members of the group share


@runtime_checkable
class PackedLinear(Protocol):
    """A weight [N, K] (and bias [N]) in whatever layout the backend multiplies fastest."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int:
        """Bytes held by the packed weight and the bias."""
        ...

    def unpack(self) -> Tensor:
        """The weight [N, K], row-major. A copy unless the packed form is already row-major."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """`linear(x, self)`."""
        ...


@runtime_checkable
class WritingLinear(Protocol):
    """A `PackedLinear` whose product can be put where it is wanted."""

    def write(self, x: Tensor, out: Tensor) -> None:
        """`linear(x, self)` of x [M, K] into out [M, N], contiguous, in x's dtype."""
        ...


@runtime_checkable
class QuantLinear(PackedLinear, Protocol):
    """A quantised weight: see `streamserve_kernels.quantised`, or `stored`, for what it is.

    `dtype` is that of the weight it was made from, or of the model; `quantization` of a stored one
    is the nearest of the names. `unpack` gives float32, the very weight that the
    codes stand for.
    """

    @property
    def quantization(self) -> Quantization: ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [T] int64 of the weight -> [T, K] in `dtype`: a tied embedding."""
        ...


class HeadsLinear(Protocol):
    """A weight [H, N, K]: a matrix for each head. See `naive.prepare_by_head`."""

    @property
    def nbytes(self) -> int: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class NotRecordableError(Exception):
    """A forward does something that a backend's recorder has no instruction for."""


class StepTensors(Protocol):
    """A step's tensors: what a recorded forward reads anew at each run. See `ForwardBatch`."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def slot_mapping(self) -> Tensor: ...
    @property
    def query_start_loc(self) -> Tensor: ...
    @property
    def seq_lens(self) -> Tensor: ...
    @property
    def block_table(self) -> Tensor: ...
    @property
    def logits_indices(self) -> Tensor: ...
    @property
    def prefix_groups(self) -> PrefixGroups | None: ...
    @property
    def adapters(self) -> StepAdapters | None: ...
    @property
    def states(self) -> StepStates | None: ...
    @property
    def hidden_states(self) -> Tensor | None: ...


class RecordedStep(Protocol):
    """A forward that was written down: one call a step. Results are overwritten by the next."""

    @property
    def max_tokens(self) -> int:
        """The largest step."""
        ...

    @property
    def max_logits(self) -> int:
        """The most rows of a step that need logits."""
        ...

    def logits(self, batch: StepTensors) -> Tensor:
        """Logits [L, V] float32 of `batch.logits_indices`."""
        ...

    def greedy(self, batch: StepTensors) -> Tensor:
        """The arg-max [L] int64 of the same rows, the first of equals."""
        ...

    def hidden_states(self, num_rows: int) -> Tensor:
        """What the head was given [num_rows, H] in the step that ran last."""
        ...

    def tapped(self, num_tokens: int) -> list[Tensor]:
        """What else it was recorded to give, [num_tokens, H] each, of the step that ran last."""
        ...


class StepRecorder(Protocol):
    """Offers a backend's functions on symbols, and writes down what they are called with.

    A forward of `batch` that runs on these functions and on packed weights of the same backend ends
    with the hidden states of the rows that need logits; `finish` makes a `RecordedStep` of it. Any
    of it may raise NotRecordableError.
    """

    @property
    def batch(self) -> Any:
        """What stands for the step's tensors."""
        ...

    def give_hidden_states(self, width: int) -> None:
        """Has the batch have hidden states [T, width]: to be said first."""
        ...

    def finish(
        self,
        x: Any,
        head: PackedLinear,
        scale: float,
        soft_cap: float | None,
        tapped: Sequence[Any] = (),
    ) -> RecordedStep:
        """`x` are the hidden states; logits are scaled, then capped. `tapped` it gives besides."""
        ...


class Kernels(Protocol):
    """One backend. The semantics are those of `streamserve_kernels.naive`, function by function."""

    @property
    def name(self) -> str: ...

    def kv_cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, ...]: ...

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None: ...

    def copy_blocks(self, caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None: ...

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        *,
        scale: float,
        window: int | None = None,
        alibi_slopes: Tensor | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        prefix_groups: PrefixGroups | None = None,
        max_query_len: int | None = None,
    ) -> Tensor: ...

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None = None,
        weight_offset: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def rotary_embedding(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        *,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def rotary_write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        *,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def gated_activation(self, x: Tensor, kind: GatedKind) -> Tensor: ...

    def activation(self, x: Tensor, kind: ActivationKind) -> Tensor: ...

    def prepare_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear: ...

    def prepare_quantised(
        self, weight: Tensor, bias: Tensor | None, quantization: Quantization
    ) -> QuantLinear: ...

    def prepare_stored(
        self, weight: StoredWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear: ...

    def prepare_by_head(self, weight: Tensor) -> HeadsLinear: ...

    def slow_quantisation(self) -> str | None:
        """Why products with quantised weights are slow here, or None where they are fast."""
        ...

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor: ...

    def embedding(self, ids: Tensor, weight: Tensor | QuantLinear) -> Tensor: ...

    def side_by_side(self, parts: Sequence[Tensor]) -> Tensor: ...

    @property
    def AdapterTable(self) -> type[adapters.AdapterTable]: ...  # noqa: N802

    def add_adapters(
        self, y: Tensor, x: Tensor, table: adapters.AdapterTable, rows: AdapterRows | None
    ) -> Tensor:
        """`rows` is None only while a step is recorded."""
        ...

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        routing: Routing,
        kind: ExpertKind,
    ) -> Tensor: ...

    def add_shared_experts(
        self, chosen: Tensor, x: Tensor, gate: Tensor, shared: Tensor
    ) -> Tensor: ...

    def chosen_experts(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        activate: Callable[[Tensor], Tensor],
    ) -> Tensor: ...

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        step: StepStates,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        activation: Literal["silu"] | None = None,
    ) -> Tensor: ...

    def gated_delta_rule(
        self,
        qkv: Tensor,
        gates: Tensor,
        decay: Tensor,
        time_bias: Tensor,
        states: Tensor,
        step: StepStates,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        num_key_heads: int,
    ) -> Tensor: ...

    def state_space_scan(
        self,
        xbc: Tensor,
        dt: Tensor,
        decay: Tensor,
        time_bias: Tensor,
        skip: Tensor,
        states: Tensor,
        step: StepStates,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        num_groups: int,
    ) -> Tensor: ...

    def norm_of_gated(
        self, x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int
    ) -> Tensor: ...

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def sigmoid_gate(self, x: Tensor, gate: Tensor) -> Tensor: ...

    def warm_up(
        self,
        dtype: torch.dtype,
        head_size: int,
        value_head_size: int | None = None,
        block_size: int = 16,
    ) -> None:
        """Compiles all that a model of this dtype and these sizes will call."""
        ...

    def compilations(self) -> int:
        """Kernels compiled or read from the disk cache by this process so far."""
        ...

    def recorder(self, max_tokens: int, max_logits: int) -> StepRecorder | None:
        """Writes down a forward for steps up to these sizes, or smaller; None: cannot."""
        ...
