"""Checkpoints under FSDP2: every process writes its shards, and any number of processes reads them.

    checkpoint-N/shards/*.safetensors     fp32 weights (the masters) and moments, by torch.distributed.checkpoint in the
                                          safetensors layout of Hugging Face; "weights.NAME", "moments.NAME.KEY"
    checkpoint-N/sharded.*, scheduler.*   what no process has a part of: settings, step counts, loss scale, buffers

A Trainer that does not shard reads them, and under FSDP2 the checkpoints of one that does not are read: the masters are
the same bits. Nothing is pickled. All processes must see the folder; on several machines it is on a disk that they
share.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import zeros as sharded_zeros

from mptrain.core.errors import TrainingError, UserError
from mptrain.precision import moments8
from mptrain.precision.fully_sharded import distinct, second_names
from mptrain.train import checkpoint

FOLDER = "shards"
STATE = "sharded"


def _storage() -> Any:
    try:
        from torch.distributed import checkpoint as distributed

        return distributed.HuggingFaceStorageWriter, distributed.HuggingFaceStorageReader
    except AttributeError:
        raise UserError(
            f"checkpoints under FSDP2 need torch.distributed.checkpoint.HuggingFaceStorageWriter, which torch"
            f" {torch.__version__} does not have: use torch 2.9 or later"
        ) from None


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, scale: Any, *, writes: bool) -> None:
    """scale: state of the loss scale, or None. Every process takes part; one `writes` what all have."""
    from torch.distributed import checkpoint as distributed

    writer, _ = _storage()
    tensors = distinct(model)
    shards = {f"weights.{name}": t for name, t in tensors.items() if isinstance(t, DTensor)}
    groups, moments = _optimizer_state(model, optimizer)
    plain: dict[str, dict[str, Any]] = {}
    layout: dict[str, dict[str, Any]] = {}
    for name, state in moments.items():
        plain[name] = {k: v for k, v in state.items() if not isinstance(v, DTensor)}
        parts = {k: v for k, v in state.items() if isinstance(v, DTensor)}
        layout[name] = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in parts.items()}
        shards |= {f"moments.{name}.{key}": value for key, value in parts.items()}
    distributed.save(shards, storage_writer=writer(path=str(folder / FOLDER), save_distributed=True))
    if writes:
        buffers = {name: t for name, t in tensors.items() if not isinstance(t, DTensor)}
        state = {"groups": groups, "plain": plain, "layout": layout, "loss_scale": scale, "buffers": buffers}
        checkpoint.save_state(state, folder / STATE)


def are_in(folder: Path) -> bool:
    return (folder / FOLDER).is_dir()


def whole(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """For one process: the weights, and the state of the optimizer as torch has it, with `loss_scale`."""
    from torch.distributed import checkpoint as distributed

    saved, reader = checkpoint.load_state(folder / STATE), _storage()[1](path=str(folder / FOLDER))
    parts: dict[str, Tensor] = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        distributed.load(parts, storage_reader=reader, no_dist=True)
    weights = {n.removeprefix("weights."): t for n, t in parts.items() if n.startswith("weights.")}
    order = [name for group in saved["groups"] for name in group["params"]]
    state = {
        index: saved["plain"][name] | {key: parts[f"moments.{name}.{key}"] for key in saved["layout"][name]}
        for index, name in enumerate(order)
        if name in saved["plain"]
    }
    groups = [_settings(g) | {"params": [order.index(name) for name in g["params"]]} for g in saved["groups"]]
    return weights | saved["buffers"], {"state": state, "param_groups": groups, "loss_scale": saved["loss_scale"]}


def load_model(model: nn.Module, folder: Path) -> None:
    """The weights of a checkpoint into the shards, bit for bit. Raises TrainingError where it does not fit."""
    if not are_in(folder):
        own = folder / checkpoint.WEIGHTS
        return load_whole(model, own if own.is_file() else folder / checkpoint.PLAIN_WEIGHTS)
    tensors = distinct(model)
    _load({f"weights.{name}": t for name, t in tensors.items() if isinstance(t, DTensor)}, folder)
    buffers = checkpoint.load_state(folder / STATE)["buffers"]
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not isinstance(tensor, DTensor):
                tensor.copy_(buffers[name])


@torch.no_grad()
def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    """Moments and settings; returns the state of the loss scale."""
    if not are_in(folder):
        return _load_whole_optimizer(optimizer, folder)
    saved = checkpoint.load_state(folder / STATE)
    names = _names(model)
    shards: dict[str, Tensor] = {}
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        order = [names[id(p)] for p in group["params"]]
        if order != settings["params"]:
            raise TrainingError(f"{folder}: its optimizer trains other parameters, or in other groups, than this one")
        group.update(_settings(settings))
        for name, p in zip(order, group["params"], strict=True):
            if name not in saved["layout"]:
                continue
            state = {k: _placed(v, p, optimizer) for k, v in saved["plain"][name].items()}
            for key, (shape, dtype) in saved["layout"][name].items():
                state[key] = sharded_zeros(
                    *shape, dtype=getattr(torch, dtype), device_mesh=p.device_mesh, placements=p.placements
                )
                shards[f"moments.{name}.{key}"] = state[key]
            optimizer.state[p] = state
    if shards:
        _load(shards, folder)
    return saved["loss_scale"]


@torch.no_grad()
def load_whole(model: nn.Module, path: Path) -> None:
    """A file of whole tensors into the shards. Raises TrainingError when names differ."""
    own, second = distinct(model), second_names(model)
    with safe_open(path, "pt") as file:
        names = {second.get(name, name): name for name in file.keys()}  # noqa: SIM118 (no mapping)
        if own.keys() != names.keys():
            wrong = sorted(own.keys() ^ names.keys())
            raise TrainingError(f"{path} does not fit the model: only one of both has {', '.join(wrong[:3])}")
        for name, tensor in own.items():
            value = file.get_tensor(names[name])
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                value = distribute_tensor(value.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(value)


def _load_whole_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    if not Path(f"{folder / 'optimizer'}.json").is_file():
        raise UserError(
            f"resume_from_checkpoint: {folder} is of transformers' own Trainer; under FSDP2 mptrain.Trainer resumes"
            " what mptrain.Trainer wrote. Load its weights and train on with a new optimizer."
        )
    saved = moments8.plain(checkpoint.load_state(folder / "optimizer"))
    if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise TrainingError(f"{folder}: its optimizer trains other parameters, or in other groups, than this one")
    for group, settings in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for p, index in zip(group["params"], settings["params"], strict=True):
            state = {k: _placed(v, p, optimizer) for k, v in saved["state"].get(index, {}).items()}
            if state:
                optimizer.state[p] = state
        group.update(_settings(settings))
    return saved.get("loss_scale")


def _placed(value: Any, parameter: Any, optimizer: torch.optim.Optimizer) -> Any:
    """A value of the state of a sharded parameter: sharded like it where it has its shape."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        mesh = parameter.device_mesh
        return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device) if optimizer.defaults.get("fused") else value


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a group, as they were before JSON."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in group.items() if k != "params"}


def _load(shards: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed import checkpoint as distributed

    _, reader = _storage()
    try:
        distributed.load(shards, storage_reader=reader(path=str(folder / FOLDER)))
    except distributed.CheckpointException as error:
        why = next(iter(error.failures.values()))[0]
        raise TrainingError(f"{folder} does not fit the model: {why}") from None


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, Any]], dict[str, Mapping[str, Any]]]:
    """Settings of the groups with names of parameters, and what is kept to each. Raises UserError."""
    names = _names(model)
    groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    moments = {names[id(p)]: optimizer.state[p] for g in optimizer.param_groups for p in g["params"]}
    for name, state in moments.items():
        for key, value in state.items():
            if isinstance(value, DTensor) and not all(x == Shard(0) or x.is_replicate() for x in value.placements):
                raise UserError(
                    f"checkpoints under FSDP2: {type(optimizer).__name__} keeps {key} of {name} as {value.placements},"
                    " which cannot be saved: use AdamW, Adam or SGD"
                )
    return groups, {name: state for name, state in moments.items() if state}
