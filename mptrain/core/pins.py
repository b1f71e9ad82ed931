"""Parts of other packages that are not theirs to keep for us, and the versions with which our use of them was tested.

What is private, or lies in a module that makes no promise, may be gone with the next release. This is the one list of
it: `untested` names what is installed in another version, so that a run can say so before it trains; the tests look
every name up in the installed packages, and fail when the source uses one that is not listed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata

log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Pin:
    """tested: versions, of which the first two numbers count. inner: modules of the package without a promise, all
    below them too. private: "module:name.in.it" of what we use -> the file of ours that does. Where the last dot is
    an @, the name is an attribute that the class sets on its instances.
    """

    tested: tuple[str, ...]
    private: Mapping[str, str]
    inner: tuple[str, ...] = field(default=())


def _in(file: str, module: str, *names: str) -> dict[str, str]:
    return {f"{module}:{name}": file for name in names}


PINS: dict[str, Pin] = {
    "nncf": Pin(
        tested=("3.4",),
        inner=("nncf.common", "nncf.quantization", "nncf.tensor", "nncf.torch"),
        private={
            **_in("core/silence.py", "nncf.common.logging", "nncf_logger", "track_progress.track"),
            **dict.fromkeys(
                (
                    "nncf.common.quantization.structs:QuantizationScheme",
                    "nncf.quantization.advanced_parameters:AdvancedSmoothQuantParameters",
                    "nncf.quantization.advanced_parameters:OverflowFix",
                    "nncf.quantization.advanced_parameters:QuantizationParameters",
                    "nncf.quantization.algorithms.smooth_quant.algorithm:SmoothQuant._calculate_scale_and_ratio",
                    "nncf.tensor:Tensor",
                    "nncf.torch.extensions:ExtensionNamespace@_loaded_namespace",
                    "nncf.torch.function_hook.hook_storage:HookStorage.named_hooks",
                    "nncf.torch.function_hook.hook_storage:HookStorage.insert_hook_by_name",
                    "nncf.torch.function_hook.wrapper:get_hook_storage",
                    "nncf.torch.function_hook.wrapper:wrap_model",
                    "nncf.torch.quantization:extensions.QuantizedFunctionsCPU",
                    "nncf.torch.quantization:extensions.QuantizedFunctionsCUDA",
                    "nncf.torch.quantization.layers:AsymmetricQuantizer",
                    "nncf.torch.quantization.layers:SQMultiply",
                    "nncf.torch.quantization.layers:SymmetricQuantizer",
                    "nncf.torch.quantization.reference:torch_executor.forward",
                ),
                "compress/quantize/placement.py",
            ),
            **dict.fromkeys(
                (
                    "nncf.torch.function_hook.hook_executor_mode:FunctionHookMode.execute_pre_hooks",
                    "nncf.torch.function_hook.hook_executor_mode:FunctionHookMode@module_call_stack",
                    "nncf.torch.function_hook.hook_executor_mode:OpMeta",
                    "nncf.torch.function_hook.wrapper:ForwardWithHooks.orig_forward",
                ),
                "compress/quantize/operations.py",
            ),
        },
    ),
    "openvino": Pin(
        tested=("2026.4",),
        inner=("openvino._offline_transformations",),
        private={
            "openvino._offline_transformations:apply_make_stateful_transformation": "export/openvino/cached.py",
        },
    ),
    "coremltools": Pin(
        tested=("9.0",),
        inner=("coremltools.converters.mil.frontend", "coremltools.converters.mil.mil.passes"),
        private={
            "coremltools.converters.mil.frontend.milproto.load:TranscriptionContext": "mil/program.py",
            "coremltools.converters.mil.frontend.milproto.load:_load_value": "mil/program.py",
            "coremltools.converters.mil.mil.passes:pass_pipeline.tqdm": "export/coreml/compat.py",
            "coremltools.converters.mil.mil.ops.defs._utils:promote_input_dtypes": "export/coreml/compat.py",
            **_in(
                "export/coreml/compat.py",
                "coremltools.converters.mil.frontend.torch",
                "ops._cast",
                "ops._get_inputs",
                "ops._tqdm",
                "converter.TorchConverter._add_const",
                "torch_op_registry._TORCH_OPS_REGISTRY",
                "utils.NUM_TO_DTYPE_STRING",
                "utils.sanitize_op_kind",
            ),
        },
    ),
    "coreai-torch": Pin(
        tested=("0.4",),
        inner=("coreai_torch._compression",),
        private={
            "coreai_torch._compression:custom_layers": "export/coreai/weights.py",
            "coreai_torch._compression:utils.UintxTensor": "export/coreai/weights.py",
        },
    ),
    "coreai-core": Pin(
        tested=("1.0",),
        private={
            "coreai.authoring.asset:AIProgram._get_graph": "export/coreai/facts.py",
            "coreai.authoring.asset:AIProgram@_module": "export/coreai/facts.py",
            "coreai.authoring.asset:AIProgram@_mlir_module": "export/coreai/facts.py",
            "coreai.runtime:AIModelAssetSummary._compatibility_version": "export/coreai/facts.py",
        },
    ),
    "transformers": Pin(
        tested=("5.5",),
        inner=("transformers.masking_utils", "transformers.cache_utils", "transformers.dynamic_module_utils"),
        private={
            **_in(
                "train/trainer.py",
                "transformers",
                "Trainer._prepare_for_training",
                "Trainer._wrap_model",
                "Trainer._clip_grad_norm",
                "Trainer._get_grad_norm",
                "Trainer._move_model_to_device",
            ),
            **_in(
                "train/saving.py",
                "transformers",
                "Trainer._get_output_dir",
                "Trainer._init_training_state",
                "Trainer._issue_warnings_after_load",
                "Trainer._save",
                "Trainer._run_epoch",
                "Trainer._save_checkpoint",
                "Trainer._save_optimizer_and_scheduler",
                "Trainer._save_scaler",
                "Trainer._save_rng_state",
                "Trainer._load_from_checkpoint",
                "Trainer._load_best_model",
                "Trainer._load_optimizer_and_scheduler",
                "Trainer._load_scaler",
                "Trainer._load_rng_state",
            ),
            "transformers:Trainer._get_train_sampler": "train/phase.py",
            "transformers:PreTrainedModel._init_weights": "models/head.py",
            "transformers:PreTrainedModel._no_split_modules": "precision/memory.py",
            "transformers:PreTrainedModel._supports_sdpa": "commands/inspect.py",
            "transformers:PreTrainedModel._keep_in_fp32_modules": "precision/policy.py",
            "transformers:PreTrainedModel._keep_in_fp32_modules_strict": "precision/policy.py",
            "transformers.core_model_loading:WeightConverter@_weight_conversions": "train/saving.py",
            "transformers.configuration_utils:PreTrainedConfig@_attn_implementation": "models/load.py",
            "transformers.configuration_utils:PreTrainedConfig@_commit_hash": "flow/identity.py",
            "transformers:AutoModelForSequenceClassification._model_mapping": "models/processor.py",
            "transformers:Wav2Vec2Model@_requires_grad": "compress/quantize/placement.py",
            "transformers.cache_utils:StaticLayer": "export/torch/cached_decoder.py",
            "transformers.cache_utils:DynamicLayer": "export/torch/decoding.py",
            "transformers.dynamic_module_utils:custom_object_save": "models/saved_class.py",
            "transformers.dynamic_module_utils:get_class_from_dynamic_module": "models/saved_class.py",
            "transformers.dynamic_module_utils:get_relative_import_files": "models/saved_class.py",
            "transformers.masking_utils:create_causal_mask": "data/sources/modeling_aquila.py",
            **_in(
                "export/torch/traceable.py",
                "transformers.masking_utils",
                "ALL_MASK_ATTENTION_FUNCTIONS",
                "causal_mask_function",
                "find_packed_sequence_indices",
            ),
        },
    ),
    "accelerate": Pin(tested=("1.15",), private={"accelerate.accelerator:fsdp2_prepare_model": "train/sharding.py"}),
    "torch": Pin(
        tested=("2.13",),
        private={
            "torch.distributed._composable_state:_module_state_mapping": "precision/fully_sharded.py",
            "torch:_C._jit_pass_inline": "export/coreml/convert.py",
            "torch:_C.DisableTorchFunction": "compress/quantize/fake_quant.py",
            "torch._ops:OpOverload@_schema": "verify/programs/aten.py",
            "torch:UntypedStorage._cdata": "compress/structure/counting.py",
            "torch.utils._python_dispatch:TorchDispatchMode": "verify/programs/aten.py",
            "torch:Tensor._base": "verify/programs/aten.py",
            **_in("verify/programs/exported.py", "torch.utils._pytree", "tree_leaves", "tree_map", "tree_map_only"),
            "torch:_foreach_mul_": "precision/sharded.py",
            **_in("precision/step.py", "torch", "_foreach_copy_", "_fused_adam_", "_fused_adamw_", "_fused_sgd_"),
            "torch.nn.modules.batchnorm:_NormBase": "precision/policy.py",
            "torch.nn.modules.conv:_ConvNd@_reversed_padding_repeated_twice": "compress/calibrate/unfolded.py",
            "torch.nn:Module@_modules": "precision/master.py",
            "torch.nn:Module@_forward_hooks": "compress/structure/fingerprint.py",
            "torch.nn:Module@_forward_pre_hooks": "compress/structure/fingerprint.py",
            "torch:_utils._rebuild_parameter": "precision/whole.py",
            "torch._dynamo.exc:UserError": "export/torch/graphs.py",
            **_in("export/torch/graphs.py", "torch.ops", "aten._assert_scalar", "aten._assert_tensor_metadata"),
            **_in("export/onnx/operations.py", "torch.onnx._internal.exporter", "_fx_passes", "_registration"),
            "torch._dynamo.eval_frame:OptimizedModule@_orig_mod": "precision/optimizer.py",
        },
    ),
}


def is_tested(version: str, pin: Pin) -> bool:
    """By the first two numbers."""
    return re.match(r"\d+\.\d+", version + ".0")[0] in pin.tested  # type: ignore[index]


def untested(packages: Iterable[str]) -> list[str]:
    """Of the named packages, a sentence for each that is installed in a version whose private parts are not tested."""
    found = []
    for name in packages:
        pin = PINS.get(name)
        version = _installed(name)
        if pin is None or version is None or is_tested(version, pin):
            continue
        found.append(
            f"{name} {version} is installed; mptrain uses private parts of it, tested with {' and '.join(pin.tested)}."
            f" Should something fail: pip install '{name}=={pin.tested[-1]}.*'"
        )
    return found


def warn_untested(packages: Iterable[str]) -> None:
    """Says before work what `untested` finds, once in a process."""
    for said in untested(packages):
        if said not in _said:
            _said.add(said)
            log.warning("%s", said)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
