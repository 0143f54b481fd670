"""Autograd, torch.func, torch.compile and torch.export over the clustering operations: right or raising, never zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_transforms import assert_same, compiled
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from fastseq import functional as F
from fastseq import reference
from fastseq.testing import use_implementation

N, d, K, S = 5, 3, 4, 3
OPS = ["student_t_assignment", "target_distribution", "clustering_loss", "clustering_loss(freq)", "nearest_center"]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Problem:
    """One operation as a scalar loss of two inputs, over our function and over the reference."""

    def __init__(self, op: str) -> None:
        self.op = op
        p, freq = torch.rand(N, K, dtype=torch.float64), 1 + torch.rand(K, dtype=torch.float64)
        self.freq = freq
        self.inputs = (randn(N, d), randn(K, d))
        if op == "target_distribution":
            self.inputs = (torch.rand(N, K, dtype=torch.float64), 1 + torch.rand(K, dtype=torch.float64))

        def loss_over(module: Any) -> Callable[..., Tensor]:
            def loss(first: Tensor, second: Tensor) -> Tensor:
                if op == "student_t_assignment":
                    return module.student_t_assignment(first, second, 2.0).sin().sum()
                if op == "target_distribution":
                    return (
                        (module.target_distribution(first, second) ** 3 + module.target_distribution(first)).sin().sum()
                    )
                if op == "nearest_center":
                    return module.nearest_center(first, second)[1].sin().sum()
                options = {"target": p} if op == "clustering_loss" else {"freq": freq}
                return module.clustering_loss(first, second, alpha=2.0, reduction="batchmean", **options).sin()

            return loss

        self.loss, self.reference = loss_over(F), loss_over(reference)

    def batched(self, which: int) -> tuple[list[Tensor], tuple[int | None, ...]]:
        """Inputs with a leading dimension of S on the one with this index, and vmap's in_dims."""
        inputs = list(self.inputs)
        shape = (S, *inputs[which].shape)
        inputs[which] = 1 + torch.rand(shape, dtype=torch.float64) if "target" in self.op else randn(*shape)
        return inputs, tuple(0 if k == which else None for k in range(2))


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["reference", "cpp"])
def problem(request: pytest.FixtureRequest, op: str, seed: int) -> Any:
    with use_implementation(request.param):
        yield Problem(op)


def transformed(problem: Problem, make: Callable[[Callable[..., Tensor]], Any]) -> None:
    assert_same(make(problem.loss), make(problem.reference))


def test_gradcheck_and_gradgradcheck(problem: Problem) -> None:
    leaves = tuple(value.clone().requires_grad_() for value in problem.inputs)
    if "freq" in problem.op:
        # P follows from the inputs, and is held constant all the same: what comes back is the gradient of the loss with
        # that P as its target, and not the derivative of the value.
        q = reference.student_t_assignment(*problem.inputs, 2.0)
        target = reference.target_distribution(q, problem.freq)
        given = reference.clustering_loss(*leaves, target=target, alpha=2.0, reduction="batchmean").sin()
        assert_same(torch.autograd.grad(problem.loss(*leaves), leaves), torch.autograd.grad(given, leaves))
        return
    assert torch.autograd.gradcheck(problem.loss, leaves)
    assert torch.autograd.gradgradcheck(problem.loss, leaves)
    for wanted in range(2):  # one alone
        some = tuple(leaf if k == wanted else leaf.detach() for k, leaf in enumerate(leaves))
        assert torch.autograd.gradcheck(problem.loss, some)


def test_inputs_that_depend_on_each_other(problem: Problem) -> None:
    """Centres that are functions of the points: each path counts once, in both derivatives."""

    def twice(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = problem.inputs[0].clone().requires_grad_()
        (once,) = torch.autograd.grad(loss(first, problem.inputs[1] * first.sum().cos()), first, create_graph=True)
        return once, *torch.autograd.grad((once**2).sum(), first)

    transformed(problem, twice)


def test_two_backward_passes_over_a_kept_graph(problem: Problem) -> None:
    leaves = [value.clone().requires_grad_() for value in problem.inputs]
    loss = problem.loss(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_that_arrive_in_a_batch(problem: Problem) -> None:
    def run(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in problem.inputs]
        arriving = torch.arange(1.0, 4.0, dtype=torch.float64)
        return torch.autograd.grad(loss(*leaves), leaves, arriving, is_grads_batched=True)

    transformed(problem, run)


def test_no_gradient_wanted_no_graph(problem: Problem) -> None:
    leaves = [value.clone().requires_grad_() for value in problem.inputs]
    with torch.no_grad():
        assert not problem.loss(*leaves).requires_grad
    with torch.inference_mode():
        assert problem.loss(*leaves).is_inference()
    assert not problem.loss(*problem.inputs).requires_grad


def test_grad_and_jacrev(problem: Problem) -> None:
    transformed(problem, lambda loss: grad(loss, argnums=(0, 1))(*problem.inputs))
    transformed(problem, lambda loss: jacrev(jacrev(lambda z: loss(z, problem.inputs[1])))(problem.inputs[0]))


@pytest.mark.parametrize("which", [0, 1])
def test_vmap(problem: Problem, which: int) -> None:
    inputs, in_dims = problem.batched(which)
    transformed(problem, lambda loss: vmap(loss, in_dims=in_dims)(*inputs))
    transformed(problem, lambda loss: grad(lambda *a: vmap(loss, in_dims=in_dims)(*a).sum(), argnums=(0, 1))(*inputs))
    transformed(problem, lambda loss: vmap(grad(loss, argnums=(0, 1)), in_dims=in_dims)(*inputs))
    transformed(problem, lambda loss: vmap(grad(loss), in_dims=in_dims)(*inputs))  # of the points alone


@pytest.mark.parametrize("which", [0, 1])
def test_backward_through_vmap(problem: Problem, which: int) -> None:
    inputs, in_dims = problem.batched(which)

    def run(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in inputs]
        return torch.autograd.grad(vmap(loss, in_dims=in_dims)(*leaves).sum(), leaves)

    transformed(problem, run)


def test_vmap_over_any_dimension(seed: int) -> None:
    z, centers = randn(N, S, d), randn(K, d)
    for function in (
        lambda module, z: module.student_t_assignment(z, centers),
        lambda module, z: module.nearest_center(z, centers)[0],
    ):
        got, truth = (vmap(lambda z, m=module, f=function: f(m, z), in_dims=1)(z) for module in (F, reference))
        torch.testing.assert_close(got, truth)


def test_forward_mode_raises(op: str, seed: int) -> None:
    problem = Problem(op)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda z: problem.loss(z, problem.inputs[1]), problem.inputs[:1], problem.inputs[:1])


def test_compiled_training(op: str, seed: int) -> None:
    """Forward and backward in one graph without a break."""
    problem = Problem(op)

    def run(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in problem.inputs]
        return torch.autograd.grad(loss(*leaves), leaves)

    assert_same(run(compiled(problem.loss)), run(problem.reference))


def test_compiled_transforms(op: str, seed: int) -> None:
    problem = Problem(op)
    inputs, in_dims = problem.batched(0)

    def grad_of_vmap(loss: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad(lambda *a: vmap(loss, in_dims=in_dims)(*a).sum(), argnums=(0, 1))

    assert_same(compiled(grad_of_vmap(problem.loss))(*inputs), grad_of_vmap(problem.reference)(*inputs))


@pytest.mark.full
def test_compiled_by_inductor_for_every_size(seed: int) -> None:
    def loss(z: Tensor, centers: Tensor) -> Tensor:
        p = F.target_distribution(F.student_t_assignment(z, centers)).detach()
        return F.clustering_loss(z, centers, p, reduction="batchmean")

    def run(function: Callable[..., Tensor], points: int) -> tuple[Tensor, ...]:
        leaves = [randn(points, d).requires_grad_(), randn(K, d).requires_grad_()]
        return torch.autograd.grad(function(*leaves), leaves)

    function = compiled(loss, backend="inductor", dynamic=True)
    for points in (5, 90, 17):
        state = torch.get_rng_state()
        got = run(function, points)
        torch.set_rng_state(state)
        assert_same(got, run(loss, points))


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, implementation: str, seed: int) -> None:
    z, centers = (torch.randn(n, d, requires_grad=requires_grad) for n in (N, K))
    q, freq = torch.rand(N, K), 1 + torch.rand(K)
    ops, opcheck = torch.ops.fastseq, torch.library.opcheck
    with use_implementation(implementation):
        opcheck(ops.student_t_fwd.default, (z, centers, 2.0))
        opcheck(ops.student_t_bwd.default, (torch.randn(N, K), z, centers, 2.0, 3))
        opcheck(ops.target_distribution_fwd.default, (q.requires_grad_(requires_grad), None))
        opcheck(ops.target_distribution_fwd.default, (q, freq))
        # With gradients the last of opcheck's tests adds up all outputs, which labels and distances do not allow.
        without = ["test_schema", "test_autograd_registration", "test_faketensor"]
        opcheck(ops.nearest_center_fwd.default, (z, centers), **({"test_utils": without} if requires_grad else {}))
        for given in ((q.detach(), None), (None, freq)):
            opcheck(ops.clustering_loss_fwd.default, (z, centers, *given, 2.0, "sum", 0 if requires_grad else 3))
            grads = torch.randn(N, d), torch.randn(K, d)
            if not requires_grad:  # with it, the second derivative is that of the reference, whatever these are
                opcheck(
                    ops.clustering_loss_bwd.default,
                    (torch.tensor(0.5), z, centers, *given, *grads, 2.0, "sum", 3),
                )


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers = torch.nn.Parameter(randn(K, d))

    def forward(self, z: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        q = F.student_t_assignment(z, self.centers)
        return q, F.clustering_loss(z, self.centers, target), *F.nearest_center(z, self.centers)


def test_export_with_dynamic_sizes(seed: int) -> None:
    layer, points = Layer(), torch.export.Dim("N")
    args = randn(7, d), torch.rand(7, K, dtype=torch.float64)
    exported = torch.export.export(layer, args, dynamic_shapes=({0: points}, {0: points}))
    other = randn(33, d), torch.rand(33, K, dtype=torch.float64)
    for got, truth in zip(exported.module()(*other), layer(*other), strict=True):
        torch.testing.assert_close(got, truth, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_autocast_computes_in_float32(implementation: str, seed: int) -> None:
    """As torch does for cdist, softmax and kl_div: a point in bfloat16 meets centres in float32."""
    z, centers = torch.randn(N, d).bfloat16(), torch.randn(K, d, requires_grad=True)
    p = torch.rand(N, K)
    with use_implementation(implementation):
        with torch.autocast("cpu", torch.bfloat16):
            q, loss = F.student_t_assignment(z, centers), F.clustering_loss(z, centers, p)
            labels, distance = F.nearest_center(z, centers)
            target = F.target_distribution(q.bfloat16())
        assert {value.dtype for value in (q, loss, distance, target)} == {torch.float32}
        (got,) = torch.autograd.grad(loss, centers)
        (truth,) = torch.autograd.grad(F.clustering_loss(z.float(), centers, p), centers)
        assert torch.equal(got, truth)
        assert torch.equal(labels, F.nearest_center(z.float(), centers)[0])
