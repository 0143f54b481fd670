"""Providers that run an ONNX model: onnxruntime and OpenVINO. Forward and streaming step, in float32."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.cli.bench import onnx_model
from fastseq.cli.bench.cases import Case
from fastseq.cli.bench.problem import Problem, Runner

Array = "numpy.ndarray[Any, Any]"


class ModelRunner:
    """A loaded model: arrays by input name in, the outputs in order out."""

    def __init__(self, problem: Problem, run: Callable[[dict[str, Any]], Sequence[Any]]) -> None:
        self.run = run
        self.input = {"x": problem.input.numpy()}
        if problem.case.mode == "step":
            self.input |= {name: state.numpy() for name, state in zip(("h", "c"), problem.state, strict=False)}

    def forward(self, input: Tensor) -> Tensor:
        """The output, as a tensor over the array that the runtime returned."""
        return torch.from_numpy(self.run({"x": input.numpy()})[0])

    def training(self, grad_output: Tensor) -> list[Tensor]:
        """There is no BPTT in these runtimes."""
        raise NotImplementedError

    def step(self) -> list[Tensor]:
        """One step with the state as further inputs and outputs."""
        output, *after = self.run(self.input)
        return [torch.from_numpy(output[0]), *(torch.from_numpy(state[0]) for state in after)]


def _why_not(package: str, case: Case) -> str | None:
    if case.mode not in ("forward", "step"):
        return "inference only"
    if case.dtype != "float32" or case.variant != "plain" or case.proj_size:
        return "plain float32 layers only"
    missing = [name for name in (package, "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'fastseq[bench]'"
    return None


class OnnxRuntime:
    """onnxruntime's CPU execution provider."""

    name = "onnxruntime"
    pool = "onnxruntime"

    def why_not(self, case: Case) -> str | None:
        """The reason why it cannot serve the case, or None."""
        return _why_not("onnxruntime", case)

    def runner(self, problem: Problem) -> Runner:
        """A session as users get it, with as many threads as torch has. They spin after a call too, which the pause
        between providers waits out."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        model = onnx_model.build(problem, with_state=problem.case.mode == "step")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return ModelRunner(problem, lambda arrays: session.run(None, arrays))


class OpenVino:
    """OpenVINO's CPU plugin."""

    name = "openvino"
    pool = "openvino"

    def why_not(self, case: Case) -> str | None:
        """The reason why it cannot serve the case, or None."""
        return _why_not("openvino", case)

    def runner(self, problem: Problem) -> Runner:
        """A model compiled for latency with as many threads as torch has; float32 as the others compute in it, since
        the plugin would take bfloat16 where the processor has it."""
        import openvino

        core = openvino.Core()
        model = core.read_model(onnx_model.build(problem, with_state=problem.case.mode == "step"))
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def run(arrays: dict[str, Any]) -> Sequence[Any]:
            results = request.infer(arrays, share_inputs=True, share_outputs=True)
            return [results[port] for port in request.model_outputs]

        return ModelRunner(problem, run)
