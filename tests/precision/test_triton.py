"""The Triton kernel in Triton's interpreter, and compiled (not run) for two generations of GPUs.

The interpreter is chosen when a kernel is defined, so each test runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import kit
import pytest
from kit.long import except_for


def run(code, **environment):
    paths = os.pathsep.join([str(Path(kit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_triton_in_the_interpreter_keeps_the_contract_of_the_other_kernels():
    """The tests of the CPU kernels, with this one in their place."""
    code = """
import math
from kit import kernels
from mptrain.precision.triton_kernel import TritonKernel
kernel = TritonKernel()
for weights in kernels.WEIGHTS:
    for rule in ("adamw", "dampening", "sgd") if weights != "bf16" else kernels.RULES:
        kernels.check_float64_reference(kernel, rule, weights)
    kernels.check_norm(kernel, weights)
    kernels.check_fp32_gradients(kernel, weights)
kernels.check_norm_of_bad_gradients(kernel, "fp16", math.nan)
kernels.check_deterministic(kernel, "split")
kernels.check_torch_optim(kernel, "adam")
kernels.check_coded_reference(kernel, "adamw", exact=False)
kernels.check_small_moments_beside_large_ones(kernel)
kernels.check_fp32_gradients(kernel, kernels.CODED)
print("done")
"""
    assert run(code, TRITON_INTERPRET="1").strip() == "done"


@pytest.mark.parametrize("architecture", except_for([80, 90], [90]))
def test_triton_compiles_for_cuda(architecture):
    """To machine code, for every variant a step can ask for; this needs no GPU."""
    code = f"""
import itertools
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mptrain.precision import triton_kernel as k

def compiled(kernel, pointers, constants):
    names = kernel.arg_names
    signature = {{n: "constexpr" if n in constants else pointers.get(n, "fp32") for n in names}}
    source = ASTSource(kernel, signature, {{(names.index(n),): v for n, v in constants.items()}})
    return triton.compile(source, target=GPUTarget("cuda", {architecture}, 32)).asm["cubin"]

pointers = {{"pieces": "*i64", "master": "*fp32", "low": "*i16", "first": "*fp32", "second": "*fp32", "sums": "*fp32"}}
sizes = {{"BLOCK": k.BLOCK}}
done = 0
for half, gradient in [("fp16", tl.float16), ("bf16", tl.bfloat16), ("fp32", tl.float32)]:
    assert compiled(k._norm, pointers, {{"TYPE": gradient, **sizes}})
    for kind, split in itertools.product(range(3), (False, True) if half == "bf16" else (False,)):
        constants = {{"TYPE": gradient, "KIND": kind, "HALF": half != "fp32", "SPLIT": split, **sizes}}
        assert compiled(k._update, {{**pointers, "half": f"*{{half}}"}}, constants)
        done += 1
pointers |= {{"first": "*i8", "second": "*u8", "first_exponents": "*u8", "second_exponents": "*u8"}}
for gradient in (tl.bfloat16, tl.float32):
    given = {{**pointers, "half": "*bf16", "turn1": "i32", "turn2": "i32"}}
    assert compiled(k._update_int8, given, {{"TYPE": gradient, **sizes}})
    done += 1
print(done)
"""
    assert run(code, TRITON_DEFAULT_FP_FUSION="1").strip() == "14"
