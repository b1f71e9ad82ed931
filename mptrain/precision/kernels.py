"""Which kernel steps the parameters of a device."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from mptrain.core.errors import UserError
from mptrain.precision.cpp_kernel import native_kernel
from mptrain.precision.step import Kernel, TorchKernel

KernelChoice = Literal["auto", "native", "torch"]


def kernel_for(device: torch.device, choice: KernelChoice) -> Kernel:
    """Raises UserError for "native" where that cannot be built."""
    if device.type == "cpu" and choice != "torch":
        kernel = native_kernel()
        if kernel is not None:
            return kernel
        if choice == "native":
            raise UserError("kernel='native', but it could not be built here (see the log); use kernel='auto'")
    if device.type == "cuda" and choice == "auto" and importlib.util.find_spec("triton"):
        from mptrain.precision.triton_kernel import TritonKernel

        return TritonKernel()
    return TorchKernel(device)
