"""Causal language models as IR that keep their keys and values between calls, as OVModelForCausalLM wants them.

    call   input_ids [b, n], attention_mask [b, past + n], beam_idx [b], where the model takes them position_ids [b, n]
    state  past_key_values.<layer>.key and .value, [b, key-value heads, past, head size]; after a reset past is 0
    gives  logits [b, n, vocabulary], or what heads make of the last; the state has past + n places then

Row i of a call goes on with row beam_idx[i] of the state. The trace has keys and values as inputs and outputs; a pair
of them is made a variable, which starts empty with the rows of input_ids.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as opset
from openvino._offline_transformations import apply_make_stateful_transformation

from mptrain.export.torch.decoding import BEAM, PAST, present

RUNTIME = {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""in the file, for the CPU plugin's own choice is 8 bits for both, the state and activations before compressed weights;
who asks for it when the model is compiled gets it"""


def make_stateful(graph: ov.Model) -> None:
    """Make variables of the keys and values of a converted decoder, and add beam_idx, int32."""
    names = [port.any_name for port in graph.inputs if port.any_name.startswith(PAST)]
    beam = opset.parameter(ov.PartialShape([-1]), ov.Type.i32, name=BEAM)
    beam.output(0).get_tensor().set_names({BEAM})
    graph.add_parameters([beam])
    for name in names:
        held = graph.input(name)
        readers = held.get_target_inputs()
        chosen = opset.gather(held, beam, opset.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {name: present(name) for name in names})
    rows = opset.gather(
        opset.shape_of(graph.input("input_ids"), output_type="i64"), opset.constant([0]), opset.constant(0)
    )
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            rest = opset.constant(np.array([heads.get_length(), 0, size.get_length()], dtype=np.int64))
            node.set_arguments([opset.broadcast(opset.constant(np.float32(0)), opset.concat([rows, rest], 0))])
    for option, value in RUNTIME.items():
        graph.set_rt_info(value, ["runtime_options", option])
    graph.validate_nodes_and_infer_types()
