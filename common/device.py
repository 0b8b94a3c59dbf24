"""From the host to the device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(device: torch.device, values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, which may be a tensor on the CPU, on the device, without waiting for what that is doing."""
    tensor = torch.as_tensor(np.asarray(values), dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
