"""What a model computes, apart from its values: the classes, settings and shapes of its modules, as one key.

Two models with the same key have the same blocks. None for a model whose code was changed on the instance (a forward
of its own, hooks): nothing is known of that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from mptrain.compress.structure.attributes import OwnConfig
from mptrain.core.hooks import HOOKS, is_quantized

_PLAIN = (bool, int, float, str, type(None))


def of(model: nn.Module) -> Hashable | None:
    modules = []
    tensors: dict[int, int] = {}
    for name, module in model.named_modules():
        if name.partition(".")[0] == HOOKS:
            continue
        changed = "forward" in vars(module) and not is_quantized(module)
        if changed or module._forward_hooks or module._forward_pre_hooks:
            return None
        own = tuple(
            (last, tensors.setdefault(id(tensor), len(tensors)), tuple(tensor.shape), _table(tensor))
            for store in (module._parameters, module._buffers)
            for last, tensor in store.items()
            if tensor is not None
        )
        modules.append((name, type(module), _settings(module), own))
    config: Any = getattr(model, "config", None)
    return (repr(config.to_dict()) if hasattr(config, "to_dict") else "", _kernels(config), tuple(modules))


def _table(tensor: Tensor) -> Hashable:
    """The values of integers, which may say which channels go where; of others that they are real numbers."""
    if tensor.is_floating_point() or tensor.is_meta:
        return tensor.is_floating_point()
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _settings(module: nn.Module) -> tuple[tuple[str, Hashable], ...]:
    found: list[tuple[str, Hashable]] = []
    for name, value in vars(module).items():
        if name in ("training", "forward") or name.startswith("_"):
            continue
        if isinstance(value, OwnConfig):
            found += [(f"{name}.{key}", own) for key, own in vars(value).items() if isinstance(own, _PLAIN)]
        elif isinstance(value, _PLAIN):
            found.append((name, value))
        elif isinstance(value, list | tuple) and all(isinstance(item, _PLAIN) for item in value):
            found.append((name, tuple(value)))
        elif callable(value) and not isinstance(value, nn.Module):
            found.append((name, getattr(value, "__qualname__", type(value).__qualname__)))
    return tuple(found)


def _kernels(config: Any) -> Hashable:
    return getattr(config, "_attn_implementation", None)
