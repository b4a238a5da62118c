"""What a failed step means to the engine, which knows nothing of torch."""

from __future__ import annotations

import traceback

import torch

from streamserve.errors import DeviceDeadError, OutOfMemoryError


def step_error(error: Exception, device: torch.device) -> Exception:
    """``error`` as the engine should see it: no memory, a device that is lost, or itself.

    The frames that it came through, and those of errors that it was raised beside, let go of their
    variables: whoever keeps an error would keep a step's tensors. After some errors of a GPU (an
    illegal address, an assertion in a kernel) every later call of this process fails: asking it to
    finish what it was given tells.
    """
    raised: BaseException | None = error
    while raised is not None:
        traceback.clear_frames(raised.__traceback__)
        raised = raised.__cause__ or raised.__context__
    found: Exception
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        found = OutOfMemoryError(str(error).partition("\n")[0])
    elif isinstance(error, torch.AcceleratorError) and _is_lost(device):
        found = DeviceDeadError(f"the device is lost: {str(error).partition(chr(10))[0]}")
    else:
        return error
    found.__cause__ = error
    return found


def _is_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
