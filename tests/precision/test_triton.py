"""The Triton kernel in Triton's interpreter, and compiled (not run) for two generations of GPUs.

The interpreter is chosen when a kernel is defined, so each test runs in a process of its own.
"""

import os
import subprocess
import sys

import pytest


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_triton_in_the_interpreter_keeps_the_contract_of_the_other_kernels():
    """The tests of the CPU kernels, with this one in their place."""
    code = f"""
import sys, math, itertools
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_kernels as tests
from mptrain.precision.triton_kernel import TritonKernel
tests.make_kernel = lambda name: TritonKernel()
for weights in tests.WEIGHTS:
    for rule in ("adamw", "dampening", "sgd") if weights != "bf16" else tests.RULES:
        tests.test_kernel_matches_a_float64_reference("triton", rule, weights)
    tests.test_norm_matches_float64("triton", weights)
    tests.test_fp32_gradients_give_what_half_gradients_of_the_same_value_give("triton", weights)
tests.test_norm_is_not_finite_with_one_bad_gradient_anywhere("triton", "fp16", math.nan)
tests.test_a_step_is_deterministic("triton", "split")
tests.test_kernel_matches_torch_optim_in_fp32("triton", "adam")
print("done")
"""
    assert run(code, TRITON_INTERPRET="1").strip() == "done"


@pytest.mark.parametrize("architecture", [80, 90])
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
print(done)
"""
    assert run(code, TRITON_DEFAULT_FP_FUSION="1").strip() == "12"
