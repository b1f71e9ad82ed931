"""Adapters that are still beside the weights of a model, put there by peft (`get_peft_model`, `add_adapter`)."""

from __future__ import annotations

from torch import nn

MERGE = "merge these (peft's merge_and_unload gives the model without them)"


def unmerged(model: nn.Module) -> str | None:
    """The name of the first layer that peft has put adapters beside; None, there is none. Does not import peft."""
    return next((name for name, module in model.named_modules() if _of_peft(module)), None)


def _of_peft(module: nn.Module) -> bool:
    layers = (cls for cls in type(module).__mro__ if cls.__module__.startswith("peft."))
    return any(cls.__name__ == "BaseTunerLayer" for cls in layers)
