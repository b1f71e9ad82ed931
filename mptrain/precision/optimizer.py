"""`MasterOptimizer`: a torch optimizer whose model computes in half while it updates fp32 masters.

The wrapped optimizer stays the truth for settings and state: its groups hold the masters, its state
holds the moments in torch's format, and its `step` is called after every update. For Adam, AdamW and
SGD the update has then happened in one pass over the flat buffers and that call finds no gradients;
for other optimizers it is the update.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mptrain.core.errors import ResumeError, UserError
from mptrain.core.link import Link
from mptrain.precision import accumulate, moments, moments8, rounded
from mptrain.precision.casting import Casts
from mptrain.precision.flat import Flat
from mptrain.precision.kernels import KernelChoice, kernel_for
from mptrain.precision.master import Changed, Masters
from mptrain.precision.policy import Policy
from mptrain.precision.step import AdamRule, Kernel, Run, rule_of
from mptrain.precision.whole import Whole, answer_for, forget, refuse_tracing

log = logging.getLogger(__name__)

FORMAT = "mptrain.masters/v1"


class MasterOptimizer(torch.optim.Optimizer):
    """Wraps `optimizer`, built on the parameters of `model`, which become half in place."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, policy: Policy, kernel: KernelChoice = "auto"
    ) -> None:
        # not Optimizer.__init__: groups, state and defaults are those of the wrapped optimizer
        if isinstance(model, DistributedDataParallel):
            raise UserError("masters come before DDP: build them on the plain model, then wrap the model")
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, MasterOptimizer):
            raise UserError(f"optimizer must be a torch.optim optimizer, got {type(optimizer).__name__}")
        self.policy = policy
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile
        own = {id(p) for p in self.model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise UserError(
                "the optimizer holds no parameter of this model, so the model would not train: build it on"
                " model.parameters() of the same model"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"{type(optimizer).__name__} evaluates the loss itself (its step needs a closure): use an optimizer"
                " that steps on gradients which are there"
            )
        self.optimizer = optimizer
        self.rule = rule_of(optimizer)
        if self.rule is not AdamRule and policy.moments == "int8":
            raise UserError(
                f"moments='int8' needs Adam or AdamW (without amsgrad), got {type(optimizer).__name__} with its"
                " settings: use AdamW, or moments='fp32'"
            )
        if self.rule is None and policy.master == "split":
            raise UserError(
                f"split masters need Adam, AdamW or SGD, got {type(optimizer).__name__} with its settings: other"
                " optimizers step on fp32 tensors. Use master='fp32'."
            )
        if kernel not in ("auto", "native", "torch"):
            raise UserError(f"kernel must be 'auto', 'native' or 'torch', got {kernel!r}")
        self._kernel_choice = kernel
        self._kernels: dict[torch.device, Kernel] = {}
        self._attached: DistributedDataParallel | None = None
        self._stepping = False
        self._exposed = False
        self.defaults = optimizer.defaults
        self._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks
        for parameter in self.model.parameters():
            parameter.grad = None
        rounded.tell_of([p for group in optimizer.param_groups for p in group["params"]])
        self._whole = Whole(self.model, lambda: self.masters, self.exposed)
        self._build()
        self._refusal = optimizer.register_step_pre_hook(self._refuse_direct_step)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy.compute}, master={self.policy.master}, {self.optimizer!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            f"{type(self).__name__} cannot be copied or pickled, as the model's weights are views of its buffers: save"
            " its state_dict() and load it into one that was built on the other model"
        )

    def _refuse_direct_step(self, *_: Any) -> None:
        if not self._stepping:
            raise UserError(
                "optimizer.step() was called on an optimizer that MasterWeights wraps; it would do nothing, because the"
                " gradients are on the half weights. Call step() of the MasterWeights object instead."
            )

    # -- building

    @property
    def flats(self) -> list[Flat]:
        return self.masters.flats

    def _build(self) -> None:
        groups = self.optimizer.param_groups
        trained = [(p, index) for index, group in enumerate(groups) for p in group["params"]]
        self.masters = Masters(self.model, self.policy, trained)
        self._casts = Casts(self.model, self.masters.kept, self.policy.dtype).install()
        self._refuse_tracing()
        self._whole.follow()
        answer_for(self.masters)
        for flat in self.flats:
            for entry in flat.entries:
                if entry.group is not None:
                    moments.move(self.optimizer, entry.parameter, entry.master)
            if self.rule is not None:
                moments.take_over(self.optimizer, flat, self.rule)

    def _dismantle(self, changed: Sequence[Changed] = ()) -> None:
        """fp32 parameters again in the model and the optimizer; `changed` ones with their new values."""
        self._remove_casts()
        self.zero_grad()
        forget(self.masters)
        self.masters.dismantle(changed)
        now = {id(c.entry): c.parameter for c in changed}
        for flat in self.flats:
            for entry in flat.entries:
                if entry.group is not None:
                    moments.move(self.optimizer, entry.master, now.get(id(entry), entry.parameter))

    def _refuse_tracing(self) -> None:
        self._tracing = self.model.register_forward_pre_hook(Link(refuse_tracing), prepend=True)

    def _remove_casts(self) -> None:
        self._casts.remove()
        self._tracing.remove()

    def _settle(self) -> None:
        """Take over what was done to the model's parameters from outside."""
        if not self.masters.intact():
            self._rebuild(self.masters.changes())

    def _rebuild(self, changed: Sequence[Changed]) -> None:
        if not changed:
            return
        if self._attached:
            raise UserError(
                f"{changed[0].entry.name} was resized, cast or moved to another device after DDP wrapped the model:"
                " do that first, then wrap"
            )
        self._dismantle(changed)
        self._build()

    def release(self) -> nn.Module:
        """The model with fp32 parameters of its own, and the optimizer on them; this object is done."""
        self._dismantle()
        moments.decode(self.optimizer)
        self._whole.remove()
        self._refusal.remove()
        return self.model

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Masters are built anew with the added parameters."""
        self._dismantle()
        try:
            self.optimizer.add_param_group(param_group)
        finally:
            self._build()

    # -- the model in fp32

    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """fp32 values of a parameter of the model: a view that may be written before `sync`; split: a copy."""
        flat, entry = self.masters.by_id[id(parameter)]
        return flat.read_master(entry)

    def sync(self) -> None:
        """half weights <- masters: in place, one copy for each dtype and device, nothing is allocated.

        `step` has done it already; only needed after masters were written by hand.
        """
        if not self.masters.in_place():
            self._settle()
        for flat in self.flats:
            self._kernel(flat).sync(flat)

    @contextlib.contextmanager
    def exposed(self, *, write: bool = False) -> Iterator[nn.Module]:
        """Inside, the model's parameters are the fp32 masters: to save, evaluate in fp32, load or resize.

        write: take over values that were written to them, and sync the half weights at the end.
        Parameters that were replaced or resized are taken over in any case.
        """
        if self._exposed:  # a load_state_dict inside
            yield self.model
            return
        self._settle()
        self._exposed = True
        self._remove_casts()
        try:
            with self.masters.exposed(write) as changed:
                yield self.model
        finally:
            self._exposed = False
            self._casts.install()
            self._refuse_tracing()
            self._rebuild(changed)

    # -- a step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of this step, accumulated ones too."""
        for flat in self.flats:
            accumulate.clear(flat)

    def _kernel(self, flat: Flat) -> Kernel:
        if flat.device not in self._kernels:
            self._kernels[flat.device] = kernel_for(flat.device, self._kernel_choice)
        return self._kernels[flat.device]

    def _sum_of_squares(self, runs: Sequence[Run]) -> float:
        sums: dict[torch.device, Any] = {}
        for run in runs:
            sums[run.flat.device] = sums.get(run.flat.device, 0.0) + self._kernel(run.flat).norm(run)
        return sum(float(s) for s in sums.values())

    @torch.no_grad()
    def _update(self, runs: Sequence[Run], factor: float) -> None:
        """Step with factor * gradient, and drop the gradients."""
        if self.rule is None:
            self._update_by_optimizer(factor)
            return
        for run in runs:
            rule = self.rule.of(self.param_groups[run.group], run.step + 1)
            self._kernel(run.flat).update(run, rule, factor)
            first, last = run.entries[0].index, run.entries[-1].index
            run.flat.steps[first : last + 1] += 1
            if run.step == 0:
                moments.link(self.optimizer, run.flat, run.entries, rule.states)
        self.zero_grad()
        self._step_optimizer()

    def _update_by_optimizer(self, factor: float) -> None:
        for flat in self.flats:
            if flat.dtype != torch.float32:
                accumulate.fold(flat)
        accumulate.scale(self.flats, factor)
        for flat in self.flats:
            for entry in flat.entries:
                if entry.accumulated:
                    entry.master.grad = flat.view(flat.gradients(), entry)
        self._step_optimizer()
        for flat in self.flats:
            for entry in flat.entries:
                entry.master.grad = None
            if flat.half is not None:
                flat.half[: flat.trained].copy_(flat.master[: flat.trained])
        self.zero_grad()

    def _step_optimizer(self) -> None:
        self._stepping = True
        try:
            self.optimizer.step()
        finally:
            self._stepping = False

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """torch's state and groups, and `masters`: fp32 values of what it trains, by parameter name.

        Frozen weights are the model's, as in fp32 training; a sum over their bits tells whether they are the same.
        """
        self._settle()
        state = self.optimizer.state_dict()
        return {**state, "format": FORMAT, "masters": self.masters.read(trained=True), "frozen": self.masters.frozen()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ResumeError when the state has no masters or those of another model."""
        if state_dict.get("format") != FORMAT:
            raise ResumeError(
                "the optimizer state holds no fp32 masters, so resuming from it would round the weights to"
                f" {self.policy.compute}. To go on from a plain fp32 run, load its model, then its optimizer with"
                " load_plain_state_dict."
            )
        self._settle()
        values = state_dict["masters"]
        own = {name: (entry.shape, entry.group) for name, (_, entry) in self.masters.by_name.items()}
        wrong = [
            n for n, (shape, group) in own.items() if (n in values or group is not None) and _shape(values, n) != shape
        ]
        wrong += [n for n in values if n not in own]
        if wrong:
            raise ResumeError(
                f"the masters of the state are not those of this model: {len(wrong)} of {len(own)} differ in name or"
                f" shape (first: {wrong[0]}). Build the same model with the same keep_fp32, then load."
            )
        self._load_plain(state_dict)
        self.masters.write(values)
        if state_dict.get("frozen", self.masters.frozen()) != self.masters.frozen():
            log.warning(
                "the frozen weights are not those that this optimizer state was saved beside: load the model's own"
                " state (its state_dict, or the same base model) as well"
            )

    def load_plain_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """State of a torch optimizer on the same parameters in fp32: moments and settings; the masters stay.

        So load the model's fp32 weights first.
        """
        self._settle()
        self._load_plain(state_dict)

    @torch.no_grad()
    def _load_plain(self, state_dict: Mapping[str, Any]) -> None:
        moments.load(self.optimizer, state_dict if self.policy.moments == "int8" else moments8.plain(state_dict))
        if self.rule is not None:
            for flat in self.flats:
                moments.take_over(self.optimizer, flat, self.rule)


def _shape(values: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return values[name].shape if name in values else None
