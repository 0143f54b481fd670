"""A problem's layer as an ONNX model, written node by node: what is timed is one LSTM or RNN node for each layer."""

from typing import Any

import numpy
from torch import Tensor, nn

from fastseq.cli.bench.problem import Problem

OPSET = 17
IR_VERSION = 8  # the version that came with opset 17, so that older runtimes load it
# ONNX orders an LSTM's gates input, output, forget, cell; PyTorch input, forget, cell, output.
GATES_OF_ONNX = (0, 3, 1, 2)


def gate_rows(weight: Tensor, is_lstm: bool) -> "numpy.ndarray[Any, Any]":
    """A weight [GH, ·] or bias [GH] of PyTorch with its gates in the order of ONNX."""
    array = weight.detach().float().numpy()
    return numpy.concatenate([numpy.split(array, 4)[gate] for gate in GATES_OF_ONNX]) if is_lstm else array


def build(problem: Problem, *, with_state: bool) -> bytes:
    """The model: input ``x`` [T, B, I], output ``y`` [T, B, H], of fixed sizes.

    Args:
        problem: its float32 layer is stored, without projection.
        with_state: the states go in as ``h`` (and ``c``) [layers, B, H] and come out as ``h_n`` (and ``c_n``), for a
            step; only one layer then.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    case, layer = problem.case, problem.layer
    is_lstm = isinstance(layer, nn.LSTM)
    states = ("h", "c") if is_lstm else ("h",)
    nodes, constants = [], [numpy_helper.from_array(numpy.array([1], dtype=numpy.int64), "direction")]
    name = "x"
    for k, (w_ih, w_hh, b_ih, b_hh) in enumerate(layer.all_weights):
        w, r, b_w, b_r = (gate_rows(weight, is_lstm) for weight in (w_ih, w_hh, b_ih, b_hh))
        for key, array in (("W", w[None]), ("R", r[None]), ("B", numpy.concatenate([b_w, b_r])[None])):
            constants.append(numpy_helper.from_array(array, f"{key}{k}"))
        attributes: dict[str, Any] = {"hidden_size": case.H}
        if not is_lstm:
            attributes["activations"] = [case.nonlinearity.capitalize()]
        nodes.append(
            helper.make_node(
                "LSTM" if is_lstm else "RNN",
                [name, f"W{k}", f"R{k}", f"B{k}", "", *(states if with_state else ())],
                [f"directions{k}", *((f"{state}_n" for state in states) if with_state else ())],
                **attributes,
            )
        )
        name = "y" if k == case.layers - 1 else f"y{k}"
        nodes.append(helper.make_node("Squeeze", [f"directions{k}", "direction"], [name]))

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs, outputs = [value("x", case.T, case.B, case.I)], [value("y", case.T, case.B, case.H)]
    if with_state:
        inputs += [value(state, 1, case.B, case.H) for state in states]
        outputs += [value(f"{state}_n", 1, case.B, case.H) for state in states]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized
