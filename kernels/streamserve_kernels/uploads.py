"""Small tensors on their way to a device: a step is queued meanwhile, and waits for none."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the host on ``device``, for what is queued there from here on.

    Out of pageable memory a copy would make the host wait until the device has done all that it was
    given before. Pinned memory goes back to torch when the copy is done, and no earlier.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
