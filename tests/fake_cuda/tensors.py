"""Tensors that say they are on a CUDA device, computed by the CPU underneath.

`Dispatch` is entered on every thread. What an operation does to the device is told to it; one that
would have to be refused, or that makes the host wait, is noted with its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tests.fake_cuda.device import Allocation, FakeDevice

_COMPOSED = {"aten::to", "aten::item", "aten::pin_memory", "aten::is_nonzero"}
_REPEAT_ALL = torch.ops.aten.repeat_interleave.self_int  # of a number that the host knows
# The host learns from the device how large their results are, or what it is to do.
_ASKING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave",
}
device = FakeDevice(0)  # replaced by `runtime.install`
registered: dict[int, int] = {}  # ends of ranges of the host's memory, by their starts
_pinned: dict[int, tuple[StorageWeakRef, int]] = {}  # with their bytes, by address of the object


class DeviceTensor(torch.Tensor):
    """Memory of the fake device. To C++ it is a tensor of the CPU; to Python it is not."""

    real_: Tensor
    memory_: Allocation

    @staticmethod
    def __new__(cls, real: Tensor, memory: Allocation) -> DeviceTensor:
        # A view of a tensor that is none of inference mode may not be one either.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                real.size(),
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                device="cpu",
            )
        made.real_, made.memory_ = real, memory
        return made

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", device.index)

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return self.real_.data_ptr()

    def get_device(self) -> int:
        return device.index

    def to(self, *args: Any, **options: Any) -> Tensor:
        target, dtype, non_blocking, _ = torch._C._nn._parse_to(
            *args, **{k: v for k, v in options.items() if k != "copy"}
        )
        if isinstance(next(iter(args), None), DeviceTensor):
            target, dtype = self.device, args[0].dtype
        if target is not None and target.type == "cpu":
            return _to_host(self if dtype is None else self.to(dtype), non_blocking)
        if (dtype is None or dtype == self.dtype) and not options.get("copy"):
            return self
        return torch.ops.aten._to_copy.default(self, dtype=dtype or self.dtype)

    def cpu(self) -> Tensor:
        return _to_host(self, False)

    def cuda(self, *args: Any, **options: Any) -> Tensor:
        return self

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda device type tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def item(self) -> Any:
        device.blocks("item")
        return self.real_.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("cannot pin 'cuda' memory")

    def is_pinned(self, *args: Any) -> bool:
        return False

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Dispatch(TorchDispatchMode):
    """Entered on every thread, so that factories make tensors of the device."""


def _dispatch(mode: Dispatch, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return run(func, args, kwargs or {})


# Put there afterwards: what a class brings along is wrapped in something of torch._dynamo, whose
# import takes seconds.
Dispatch.__torch_dispatch__ = _dispatch  # type: ignore[method-assign, assignment]


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on whichever side it belongs."""
    flat = _leaves((args, kwargs))
    mine = [x for x in flat if isinstance(x, DeviceTensor)]
    name: str = func._schema.name
    if kwargs.pop("pin_memory", False):
        return _pin(func(*args, **kwargs))
    to_device = any(isinstance(x, torch.device) and x.type == "cuda" for x in flat)
    if not mine and not to_device:
        return func(*args, **kwargs)
    if name in _COMPOSED or func is _REPEAT_ALL:  # in inference mode it comes whole
        with Dispatch():
            return func.decompose(*args, **kwargs)
    if name == "aten::copy_":
        return _copy(args[0], args[1], bool(args[2]) if len(args) > 2 else False)
    if name == "aten::_to_copy" and not mine:
        return _upload(args[0], kwargs)
    hosts = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
    if any(x.dim() for x in hosts) and not name.endswith("_like"):
        device.find(f"{name} of a tensor of the host")
    before = {id(x.real_): x for x in mine}
    storages = {_storage(x.real_): x.memory_ for x in mine}
    real_args, real_kwargs = _each(_unwrapped, (args, kwargs))
    is_captured = device.current.graph is not None and name.startswith("aten::index")
    if is_captured or name == "aten::embedding":
        # What lies in the inputs may be anything: nothing runs during a capture, and no kernel has
        # put in the ids that the host did not know.
        real_args = _each(_without_indices, real_args)
    if name in _ASKING or (name.startswith("aten::index") and _has_mask(args)):
        device.blocks(name)
    compute = _scaled_mm if name == "aten::_scaled_mm" else func
    results = compute(*real_args, **real_kwargs)
    if "empty" in name:
        results.zero_()  # what a kernel would write, nothing does
    made: list[Allocation] = []

    def wrapped(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        if id(result) in before:
            return before[id(result)]
        memory = storages.get(_storage(result)) if result.numel() else None
        if memory is None:
            if func.is_view and mine:
                memory = mine[0].memory_
            else:
                memory = device.allocate(result.untyped_storage().nbytes())
                made.append(memory)
                _align(result)
        return DeviceTensor(result, memory)

    found = wrapped(results) if isinstance(results, Tensor) else tree_map(wrapped, results)
    if not _is_free(func, name):
        device.queue("kernel", name, [*(x.memory_ for x in mine), *made])
    return found


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Torch 2.11's CPU knows no scales of rows."""
    assert bias is None, "unused here"
    assert scale_result is None, "unused here"
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype or a.dtype)


def _leaves(value: Any) -> list[Any]:
    """What tuples, lists and dictionaries hold, in less time than torch's pytree takes."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return [value]
    found: list[Any] = []
    for item in value:
        found += _leaves(item)
    return found


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """The same tuples, lists and dictionaries, of what the function makes of their leaves."""
    if isinstance(value, (tuple, list)):
        return type(value)([_each(function, item) for item in value])
    if isinstance(value, dict):
        return {name: _each(function, item) for name, item in value.items()}
    return function(value)


def _is_free(func: Any, name: str) -> bool:
    """Nothing is launched for it."""
    return bool(func.is_view) or name in {
        "aten::empty",
        "aten::empty_like",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::empty_strided",
        "aten::reshape",
        "aten::contiguous",
        "aten::view_as",
        "aten::_local_scalar_dense",
    }


def _align(result: Tensor) -> None:
    """Nothing to do: the host's allocator aligns to 64 bytes, which kernels cannot tell."""
    assert result.untyped_storage().data_ptr() % 16 == 0, "memory of the device is aligned"


def _storage(real: Tensor) -> int:
    return real.untyped_storage()._cdata


def _has_mask(args: Any) -> bool:
    return any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in _leaves(args[1:2])
    )


def _unwrapped(x: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.real_
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return x


def _without_indices(x: Any) -> Any:
    is_index = isinstance(x, Tensor) and not x.dtype.is_floating_point and 0 < x.dim() < 3
    return torch.zeros_like(x) if is_index else x


def is_pinned(host: Tensor) -> bool:
    """Whether the device can copy from it, or to it, by itself."""
    start, end = host.data_ptr(), host.data_ptr() + host.nbytes
    return host.untyped_storage()._cdata in _pinned or any(
        low <= start and end <= high for low, high in registered.items()
    )


def num_pinned_bytes() -> int:
    """Of memory that is pinned now."""
    asked = sum(size for storage, size in _pinned.values() if not storage.expired())
    return asked + sum(high - low for low, high in registered.items())


def _pin(host: Tensor) -> Tensor:
    storage = StorageWeakRef(host.untyped_storage())
    _pinned[storage.cdata] = storage, host.untyped_storage().nbytes()
    return host


def pin(host: Tensor) -> Tensor:
    """`Tensor.pin_memory`."""
    return _pin(host.clone())


def _copy(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
        target.real_.copy_(source.real_)
        device.queue("kernel", "aten::copy_", [target.memory_, source.memory_])
    elif isinstance(target, DeviceTensor):
        target.real_.copy_(source)
        _queue_upload(source, target, non_blocking)
    else:
        assert isinstance(source, DeviceTensor)
        _download(target, source, non_blocking)
    return target


def _upload(host: Tensor, options: dict[str, Any]) -> Tensor:
    """`host.to(device)`."""
    real = host.clone() if options.get("dtype") is None else host.to(options["dtype"])
    if real is host:
        real = host.clone()
    landed = DeviceTensor(real, device.allocate(real.untyped_storage().nbytes()))
    _queue_upload(host, landed, bool(options.get("non_blocking")))
    return landed


def _queue_upload(host: Tensor, landed: DeviceTensor, non_blocking: bool) -> None:
    name = f"{list(host.shape)} {host.dtype}"
    if host.nbytes == 0:
        return
    if is_pinned(host) and non_blocking:
        was = host.clone()

        def check() -> None:
            if not torch.equal(was.view(-1).view(torch.uint8), host.reshape(-1).view(torch.uint8)):
                device.find("pinned memory was written while it was copied")

        device.queue("h2d", name, [landed.memory_], check)
        return
    device.queue("blocking h2d", name, [landed.memory_])
    device.blocks(f"h2d {name}")


def _download(target: Tensor, source: DeviceTensor, non_blocking: bool) -> None:
    name = f"{list(source.shape)} {source.dtype}"
    if is_pinned(target) and non_blocking:
        value = source.real_.clone()

        def arrive() -> None:
            with torch.inference_mode():
                target.copy_(value)

        if target.dtype.is_floating_point:
            target.fill_(float("nan"))
        else:
            target.fill_(-7)  # until then it is rubbish
        device.queue("d2h", name, [source.memory_], arrive)
        return
    target.copy_(source.real_)
    device.queue("blocking d2h", name, [source.memory_])
    device.blocks(f"d2h {name}")


def _to_host(source: DeviceTensor, non_blocking: bool) -> Tensor:
    landed = torch.empty(source.shape, dtype=source.dtype)
    _download(landed, source, False)
    return landed


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of a kernel's arguments."""
    for value in _leaves(values):
        if isinstance(value, Tensor):
            yield value
