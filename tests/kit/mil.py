"""MIL programs written by hand, converted and saved as Core ML packages."""

import gc
import warnings

import coremltools as ct
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types


def save(program, folder, precision=ct.precision.FLOAT32, inputs=None, target=ct.target.iOS18):
    package = folder / "m.mlpackage"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coremltools leaves temporary folders to the garbage collector
        model = ct.convert(
            program,
            convert_to="mlprogram",
            compute_precision=precision,
            minimum_deployment_target=target,
            skip_model_load=True,
            inputs=inputs,
        )
        model.save(str(package))
        del model
        gc.collect()
    return package


def program(shape, build, target=ct.target.iOS18, dtype=types.fp32):
    @mb.program(input_specs=[mb.TensorSpec(shape=shape, dtype=dtype)], opset_version=target)
    def main(x):
        return build(x)

    return main
