"""Finds what lets one token of a step see another other than through attention.

A step holds tokens of many requests, and a request comes in many steps: a convolution along the
tokens, a running sum, a shift would read the neighbour's tokens, and miss its own. A forward on the
meta device costs nothing and tells: with a number of tokens that no size of the model equals, the
dimension of the tokens is known in every operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamserve.errors import UnsupportedModelError

_ALONG_A_DIMENSION = ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "roll")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


class TokenMixing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises UnsupportedModelError where an operation mixes ``num_tokens`` tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_tokens = num_tokens

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if self._is_square(result) or self._mixes(name, args, dict(kwargs or {})):
            raise UnsupportedModelError(
                "its layers let a token see earlier ones other than through transformers' "
                f"attention interface ({name})"
            )
        return result

    def _is_square(self, result: object) -> bool:
        """Tokens by tokens: the weights or the bias of an attention of its own."""
        return isinstance(result, Tensor) and result.shape.count(self._num_tokens) > 1

    def _mixes(self, name: str, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            return False
        num_tokens = self._num_tokens
        if name in _PRODUCTS:
            left = [arg for arg in args[:3] if isinstance(arg, Tensor)][-2]
            return left.shape[-1] == num_tokens
        if name == "convolution":
            return any(size >= num_tokens for size in first.shape[2:])
        if name.startswith("_scaled_dot_product"):
            return first.shape[-2] == num_tokens
        return any(self._is_tokens(first, dim) for dim in self._touched(name, args, options))

    def _touched(self, name: str, args: Sequence[Any], options: Mapping[str, Any]) -> list[int]:
        """The dimensions whose places an operation moves, drops or sums up."""
        if name in ("slice", "select"):
            given = dict(zip(("dim", "start", "end"), args[1:], strict=False)) | dict(options)
            places = range(self._num_tokens)[given.get("start") : given.get("end")]
            is_whole = name == "slice" and len(places) == self._num_tokens
            return [] if is_whole else [given.get("dim", 0)]
        if name == "constant_pad_nd":
            # From the last dimension on, two numbers each.
            return [-1 - i // 2 for i, size in enumerate(args[1]) if size]
        if name == "unfold":
            return [args[1]]
        if name in _ALONG_A_DIMENSION:
            last = args[-1] if len(args) > 1 else 0
            dims = last if isinstance(last, Sequence) else (last,)
            return [dim for dim in dims if isinstance(dim, int)]
        return []

    def _is_tokens(self, x: Tensor, dim: int) -> bool:
        return -x.dim() <= dim < x.dim() > 1 and x.shape[dim] == self._num_tokens
