"""Autograd, torch.func, torch.compile and torch.export over the operations: right or raising, never silently zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fastseq import functional as F
from fastseq import reference
from fastseq.ops import transforms
from fastseq.testing import implementations, use_implementation

T, B, I, H, P, N = 4, 2, 3, 5, 3, 3
LENGTHS = torch.tensor([4, 2])
RESET = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 0]]).bool()
FLAGS = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 2]], dtype=torch.uint8)

Function = Callable[..., tuple[Tensor, ...]]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.5 * torch.randn(shape, dtype=dtype)


def lstm_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((T, B, I), (B, P), (B, H), (4 * H, I), (4 * H, P), (4 * H,), (4 * H,), (P, H))
    return [random(*shape, dtype=dtype) for shape in shapes]


def rnn_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(*shape, dtype=dtype) for shape in ((T, B, I), (B, H), (H, I), (H, H), (H,), (H,))]


def lstm_loss(function: Function, **options: Any) -> Callable[..., Tensor]:
    def loss(*args: Tensor) -> Tensor:
        y, h_n, c_n = function(*args[:7], w_hr=args[7], **options)
        return y.sin().sum() + h_n.cos().sum() + (c_n**3).sum()

    return loss


def rnn_loss(function: Function, **options: Any) -> Callable[..., Tensor]:
    def loss(*args: Tensor) -> Tensor:
        y, h_n = function(*args, **options)
        return y.sin().sum() + (h_n**3).sum()

    return loss


class Problem:
    """One operation with its inputs, a scalar loss over it, and the same loss over the reference."""

    def __init__(self, op: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        inputs, loss = (lstm_inputs, lstm_loss) if op == "lstm" else (rnn_inputs, rnn_loss)
        self.inputs = inputs(dtype)
        self.states = 3 if op == "lstm" else 2  # x, h0 and c0 come before the weights
        self.loss = loss(getattr(F, op), **options)
        self.reference = loss(getattr(reference, op), **options)
        self.all = tuple(range(len(self.inputs)))

    def batched(self, which: str) -> tuple[list[Tensor], tuple[int | None, ...]]:
        """Inputs with a leading dimension of N on "x", the "states" (x too) or the "weights", and vmap's in_dims."""
        mapped = {"x": {0}, "states": set(range(self.states)), "weights": set(self.all[self.states :])}[which]
        inputs = [random(N, *v.shape, dtype=v.dtype) if k in mapped else v for k, v in enumerate(self.inputs)]
        return inputs, tuple(0 if k in mapped else None for k in self.all)


OPTIONS: list[dict[str, Any]] = [{}, {"reverse": True, "lengths": LENGTHS, "reset": RESET}]


@pytest.fixture(params=["reference", "cpp"])
def implementation(request: pytest.FixtureRequest) -> Any:
    with use_implementation(request.param):
        yield request.param


@pytest.fixture(params=["lstm", "rnn"])
def op(request: pytest.FixtureRequest) -> str:
    return str(request.param)


PROBLEMS = [("cpp", 0), ("cpp", 1), ("reference", 1)]


@pytest.fixture(params=PROBLEMS, ids=lambda pair: f"{pair[0]}-{'options' if pair[1] else 'plain'}")
def problem(request: pytest.FixtureRequest, op: str, seed: int) -> Any:
    name, options = request.param
    with use_implementation(name):
        yield Problem(op, **OPTIONS[options])


# Compiling takes seconds, and knows nothing of the implementation.
compiled_problem = pytest.mark.parametrize("problem", [("cpp", 1)], indirect=True, ids=["cpp"])


def assert_same(got: Any, expected: Any) -> None:
    """Equal to rounding in float64, and no gradient is zero where it should not be."""
    got, expected = (torch.utils._pytree.tree_leaves(value) for value in (got, expected))
    assert len(got) == len(expected) > 0
    for value, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)
        assert truth.abs().max() > 0
        assert value.abs().max() > 0


def transformed(problem: Problem, make: Callable[[Callable[..., Tensor]], Any]) -> None:
    assert_same(make(problem.loss), make(problem.reference))


# Derivatives in eager mode.


@pytest.mark.parametrize("bias", ["both", "none", "hh"])
def test_gradcheck_and_gradgradcheck(op: str, bias: str, implementation: str, seed: int) -> None:
    inputs = [value.requires_grad_() for value in (lstm_inputs if op == "lstm" else rnn_inputs)()]
    first = 5 if op == "lstm" else 4
    keep = {"both": (0, 1), "none": (), "hh": (1,)}[bias]
    biases: dict[int, Tensor] = {k: inputs[first + k] for k in keep}
    rest = inputs[:first] + inputs[first + 2 :]
    names = list(biases)
    options = OPTIONS[1] if bias == "both" else {}

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, args[len(rest) :], strict=True))
        pair = [given.get(0), given.get(1)]
        if op == "rnn":
            return F.rnn(*args[:4], *pair, nonlinearity="sigmoid", **options)
        return F.lstm(*args[:5], *pair, w_hr=args[5], **options)

    args = (*rest, *biases.values())
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
def test_second_derivative_of_each_nonlinearity(nonlinearity: str, seed: int) -> None:
    inputs = tuple(value.requires_grad_() for value in rnn_inputs())
    assert torch.autograd.gradgradcheck(lambda *args: F.rnn(*args, nonlinearity=nonlinearity), inputs)


def test_third_derivative(problem: Problem) -> None:
    def third(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in problem.inputs]
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        grads = torch.autograd.grad(sum((g**2).sum() for g in grads), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)

    transformed(problem, third)


def test_inputs_that_depend_on_each_other(op: str, implementation: str, seed: int) -> None:
    """The state is a function of the input, and one weight of another: each path counts once, in both derivatives."""
    problem = Problem(op)

    def twice(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x = problem.inputs[0].clone().requires_grad_()
        w = problem.inputs[problem.states].clone().requires_grad_()
        rest = list(problem.inputs)
        rest[0], rest[1], rest[problem.states] = x, rest[1] + x.sum(), w
        rest[problem.states + 1] = rest[problem.states + 1] * w.sum()
        grads = torch.autograd.grad(loss(*rest), (x, w), create_graph=True)
        return (*grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), (x, w)))

    transformed(problem, twice)


def test_two_backward_passes_over_a_kept_graph(problem: Problem) -> None:
    leaves = [value.clone().requires_grad_() for value in problem.inputs]
    loss = problem.loss(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_the_tape_is_overwritten_only_when_nobody_can_see_it(op: str, seed: int) -> None:
    calls: list[bool] = []
    problem = Problem(op)
    inputs = [value.requires_grad_() for value in problem.inputs]
    asked = transforms.may_overwrite_tape

    def spy(*args: Any) -> bool:
        calls.append(asked(*args))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "may_overwrite_tape", spy)
        torch.autograd.grad(problem.loss(*inputs), inputs)
        torch.autograd.grad(problem.loss(*inputs), inputs, retain_graph=True)
        torch.autograd.grad(problem.loss(*inputs), inputs, create_graph=True)
        grad(problem.loss)(*inputs)
        torch.autograd.grad(problem.loss(*inputs), inputs, torch.randn(N).to(inputs[0]), is_grads_batched=True)
    assert calls == [True, False, False, False, False]

    # A tape that the caller asked for stays as it was.
    options = ("tanh", False) if op == "rnn" else (False,)
    y, *_, tape = getattr(torch.ops.fastseq, f"{op}_fwd")(*inputs, None, *options, True)
    before = tape.clone()
    torch.autograd.grad(y.sum(), inputs)
    assert torch.equal(tape.nan_to_num(), before.nan_to_num())


def test_gradients_that_arrive_in_a_batch(problem: Problem) -> None:
    def run(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in problem.inputs]
        arriving = torch.arange(1.0, 4.0, dtype=torch.float64)
        return torch.autograd.grad(loss(*leaves), leaves, arriving, is_grads_batched=True)

    transformed(problem, run)


def test_gradients_of_the_two_biases_are_two_tensors(op: str, seed: int) -> None:
    problem = Problem(op)
    leaves = [value.requires_grad_() for value in problem.inputs]
    grads = torch.autograd.grad(problem.loss(*leaves), leaves)
    first = 5 if op == "lstm" else 4
    assert torch.equal(grads[first], grads[first + 1])
    assert grads[first].data_ptr() != grads[first + 1].data_ptr()


def test_no_gradient_wanted_no_graph(op: str, seed: int) -> None:
    problem = Problem(op)
    leaves = [value.requires_grad_() for value in problem.inputs]
    with torch.no_grad():
        assert not problem.loss(*leaves).requires_grad
    with torch.inference_mode():
        assert problem.loss(*leaves).is_inference()
    assert not problem.loss(*(leaf.detach() for leaf in leaves)).requires_grad


# torch.func.


def test_grad(problem: Problem) -> None:
    transformed(problem, lambda loss: grad(loss, argnums=problem.all)(*problem.inputs))


@pytest.mark.parametrize("which", ["x", "states", "weights"])
def test_vmap(problem: Problem, which: str) -> None:
    inputs, in_dims = problem.batched(which)
    transformed(problem, lambda loss: vmap(loss, in_dims=in_dims)(*inputs))


@pytest.mark.parametrize("which", ["x", "states", "weights"])
def test_grad_of_vmap(problem: Problem, which: str) -> None:
    inputs, in_dims = problem.batched(which)
    transformed(
        problem,
        lambda loss: grad(lambda *a: vmap(loss, in_dims=in_dims)(*a).sum(), argnums=problem.all)(*inputs),
    )


@pytest.mark.parametrize("which", ["x", "states", "weights"])
def test_vmap_of_grad(problem: Problem, which: str) -> None:
    """Per-sample gradients (x, states) and the gradients of an ensemble (weights)."""
    inputs, in_dims = problem.batched(which)
    transformed(problem, lambda loss: vmap(grad(loss, argnums=problem.all), in_dims=in_dims)(*inputs))
    transformed(problem, lambda loss: vmap(grad(loss), in_dims=in_dims)(*inputs))  # of x alone


@pytest.mark.parametrize("which", ["states", "weights"])
def test_backward_through_vmap(problem: Problem, which: str) -> None:
    inputs, in_dims = problem.batched(which)

    def run(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in inputs]
        return torch.autograd.grad(vmap(loss, in_dims=in_dims)(*leaves).sum(), leaves)

    transformed(problem, run)


def test_grad_of_vmap_of_grad(problem: Problem) -> None:
    inputs, in_dims = problem.batched("x")

    def run(loss: Callable[..., Tensor]) -> Any:
        def squares(*args: Tensor) -> Tensor:
            grads = vmap(grad(loss, argnums=problem.all), in_dims=in_dims)(*args)
            return sum((g**2).sum() for g in grads)  # type: ignore[return-value]

        return grad(squares, argnums=problem.all)(*inputs)

    transformed(problem, run)


def test_grad_of_grad(problem: Problem) -> None:
    def run(loss: Callable[..., Tensor]) -> Any:
        def squares(*args: Tensor) -> Tensor:
            return sum((g**2).sum() for g in grad(loss, argnums=problem.all)(*args))  # type: ignore[return-value]

        return grad(squares, argnums=problem.all)(*problem.inputs)

    transformed(problem, run)


def test_jacrev(problem: Problem) -> None:
    x, *rest = problem.inputs
    transformed(problem, lambda loss: jacrev(jacrev(lambda x: loss(x, *rest)))(x))


def test_vmap_over_any_dimension_and_over_lengths(seed: int) -> None:
    inputs = lstm_inputs()[:7]
    inputs[1], inputs[4] = random(B, H), random(4 * H, H)
    x = random(T, B, N, I)
    lengths = torch.tensor([[4, 0], [1, 2], [3, 4]])

    def run(function: Function) -> tuple[Tensor, ...]:
        mapped = vmap(lambda x, n: function(x, *inputs[1:], lengths=n), in_dims=(2, 0), out_dims=(1, 0, 0))
        return mapped(x, lengths)

    for got, truth in zip(run(F.lstm), run(reference.lstm), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)
    one = F.lstm(x[:, :, 1], *inputs[1:], lengths=lengths[1])
    torch.testing.assert_close(run(F.lstm)[0][:, 1], one[0], rtol=1e-12, atol=1e-13)


def test_nested_vmap(op: str, seed: int) -> None:
    """An ensemble of weights, each over a mapped batch."""
    problem = Problem(op)
    _, over_x = problem.batched("x")
    inputs, over_weights = problem.batched("weights")
    inputs[0] = random(2, *problem.inputs[0].shape)
    transformed(problem, lambda loss: vmap(vmap(loss, in_dims=over_x), in_dims=over_weights)(*inputs))


def test_forward_mode_raises(op: str, seed: int) -> None:
    problem = Problem(op)
    x, *rest = problem.inputs

    def loss(x: Tensor) -> Tensor:
        return problem.loss(x, *rest)

    xs, _ = problem.batched("x")
    for attempt in (
        lambda: jvp(loss, (x,), (x,)),
        lambda: jacfwd(loss)(x),
        lambda: hessian(loss)(x),
        lambda: jvp(lambda xs: vmap(loss)(xs), (xs[0],), (xs[0],)),
        lambda: vmap(lambda x: jvp(loss, (x,), (x,)))(xs[0]),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            attempt()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            loss(dual)
        loss(x)  # without a tangent it is no matter


# torch.library, torch.compile, torch.export.


@pytest.mark.parametrize(
    ("requires_grad", "flags", "bias"),
    [
        (False, None, True),
        (True, FLAGS, False),
        pytest.param(False, FLAGS, False, marks=pytest.mark.full),
        pytest.param(True, None, True, marks=pytest.mark.full),
    ],
    ids=["plain", "grad-flags-no-bias", "flags-no-bias", "grad"],
)
def test_opcheck(
    op: str, requires_grad: bool, flags: Tensor | None, bias: bool, implementation: str, seed: int
) -> None:
    inputs: list[Tensor | None] = [*(lstm_inputs if op == "lstm" else rnn_inputs)(torch.float32)]
    for value in inputs:
        assert value is not None
        value.requires_grad_(requires_grad)
    if not bias:
        first = 5 if op == "lstm" else 4
        inputs[first] = inputs[first + 1] = None
    ops, opcheck = torch.ops.fastseq, torch.library.opcheck
    # The tape has places that no one defines, so it can be compared only where it is all zeros there.
    save = implementation == "reference"
    options = ("relu", True) if op == "rnn" else (False,)
    fwd, bwd, bwd_ = (getattr(ops, f"{op}_{name}").default for name in ("fwd", "bwd", "bwd_"))
    opcheck(fwd, (*inputs, flags, *options, save))
    with torch.no_grad():
        y, _, *rest = fwd(*inputs, flags, *options, True)
    grads = [torch.randn_like(y), None, *([torch.randn_like(rest[0])] if op == "lstm" else [])]
    tape = rest[1:] if op == "lstm" else rest
    opcheck(bwd, (*grads, *inputs, flags, y, *tape, *options, 7))
    if not requires_grad:  # the one that overwrites has no derivative
        opcheck(bwd_, (*grads, *inputs, flags, y, *tape, *options, 2))


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]


@compiled_problem
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training(problem: Problem, backend: str) -> None:
    """Forward and backward in one graph without a break."""

    def run(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in problem.inputs]
        return torch.autograd.grad(loss(*leaves), leaves)

    assert_same(run(compiled(problem.loss, backend)), run(problem.reference))


@compiled_problem
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_transforms(problem: Problem, backend: str) -> None:
    inputs, in_dims = problem.batched("x")

    def grad_of_vmap(loss: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad(lambda *args: vmap(loss, in_dims=in_dims)(*args).sum(), argnums=problem.all)

    def vmap_of_grad(loss: Callable[..., Tensor]) -> Callable[..., Any]:
        return vmap(grad(loss, argnums=problem.all), in_dims=in_dims)

    wanting = [value.clone().requires_grad_() for value in inputs]
    for make, given in ((grad_of_vmap, inputs), (vmap_of_grad, inputs), (grad_of_vmap, wanting)):
        assert_same(compiled(make(problem.loss), backend)(*given), make(problem.reference)(*inputs))


def test_one_graph_for_every_length(seed: int) -> None:
    """The graph holds one node for the whole sequence, and one more compilation serves every T and B."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    x, h0, *weights = rnn_inputs()
    function = compiled(lambda x, h0: F.rnn(x, h0, *weights)[0], backend=count)
    for steps, batch in ((5, 3), (7, 4), (1000, 2), (33, 5)):
        x, h0 = random(steps, batch, I), random(batch, H)
        torch.testing.assert_close(function(x, h0), reference.rnn(x, h0, *weights)[0], rtol=1e-12, atol=1e-13)
    assert len(graphs) <= 2
    ours = [node for node in graphs[-1].graph.nodes if "fastseq" in str(node.target)]
    assert len(ours) == 1


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(lstm_inputs()[3:])

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        *weights, w_hr = self.weights
        return F.lstm(x, h0, c0, *weights, w_hr=w_hr, lengths=lengths)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(strict: bool, seed: int) -> None:
    layer = Layer()
    steps, batch = torch.export.Dim("T"), torch.export.Dim("B")
    shapes = ({0: steps, 1: batch}, {0: batch}, {0: batch}, {0: batch})
    args = (*lstm_inputs()[:3], LENGTHS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export about itself
        exported = torch.export.export(layer, args, dynamic_shapes=shapes, strict=strict)
    other = (random(11, 6, I), random(6, P), random(6, H), torch.tensor([0, 11, 3, 4, 5, 6]))
    for program in (exported, exported.run_decompositions()):
        for got, truth in zip(program.module()(*other), layer(*other), strict=True):
            torch.testing.assert_close(got, truth, rtol=0, atol=0)
    # The exported program can still be trained.
    leaf = other[0].requires_grad_()
    got = torch.autograd.grad(exported.module()(*other)[0].sum(), leaf)
    assert_same(got, torch.autograd.grad(layer(*other)[0].sum(), leaf))


# Autocast.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtypes_of_torch(op: str, dtype: torch.dtype, seed: int) -> None:
    module = torch.nn.LSTM(I, H, dtype=dtype) if op == "lstm" else torch.nn.RNN(I, H, dtype=dtype)
    x = random(T, B, I, dtype=dtype)
    leaves = [value.detach().requires_grad_() for value in module.parameters()]
    states = [random(B, H, dtype=dtype) for _ in range(2 if op == "lstm" else 1)]
    with torch.autocast("cpu", torch.bfloat16):
        expected, state = module(x)
        outputs = getattr(F, op)(x, *states, *leaves)
    expected = [expected, *(state if op == "lstm" else [state])]
    assert [out.dtype for out in outputs] == [out.dtype for out in expected]
    grads = torch.autograd.grad(sum(out.sum() for out in outputs), leaves)
    assert all(grad.dtype == dtype for grad in grads)


@pytest.mark.parametrize("implementation", implementations("lstm"))
def test_autocast_rounds_the_inputs_and_nothing_inside(op: str, implementation: str, seed: int) -> None:
    problem = Problem(op, torch.float32)
    half = [value.bfloat16() for value in problem.inputs]
    with use_implementation(implementation):
        expected = problem.loss(*half)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = list(problem.inputs)
            mixed[1] = mixed[1].bfloat16()  # autocast makes one dtype of several
            assert torch.equal(problem.loss(*mixed).to(expected), expected)
            leaves = [value.clone().requires_grad_() for value in half]
            inside = torch.autograd.grad(problem.loss(*leaves), leaves)
        outside = torch.autograd.grad(problem.loss(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_compiled_autocast(seed: int) -> None:
    inputs = rnn_inputs(torch.float32)

    def inside(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.rnn(*args)[0]

    expected = inside(*inputs)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(compiled(inside)(*inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(lambda *args: F.rnn(*args)[0])(*inputs), expected)
