"""Layers with a backward pass of their own, against what autograd makes of the formula."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drift.models.layers import RMSNorm, gated


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def require_equal(ours: Callable[..., Tensor], formula: Callable[..., Tensor], *leaves: Tensor) -> None:
    """Values and gradients of `ours` are those of the formula in float64."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, expected = ours(*leaves), formula(*exact)
    assert found.dtype == leaves[0].dtype
    scale = torch.linspace(-1, 2, found.numel()).view(found.shape)
    gradients = torch.autograd.grad((found.float() * scale).sum(), leaves)
    wanted = torch.autograd.grad((expected * scale).sum(), exact)
    rough = leaves[0].dtype == torch.bfloat16
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < (1e-2 if rough else 1e-6), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 16), (7, 16)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype):
    norm = RMSNorm(16, 1e-2)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-2).sqrt()

    require_equal(ours, formula, *inputs(shape, (16,), dtype=dtype))


def test_the_gradient_of_a_norm_is_float32_within_autocast_too():
    """Backward passes of manual optimisation run there."""
    norm, (x,) = RMSNorm(16, 1e-5), inputs((64, 16), dtype=torch.float32)
    slopes = torch.linspace(-1, 2, 16)
    (outside,) = torch.autograd.grad((norm(x) * slopes).sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad((norm(x) * slopes).sum(), x)
    torch.testing.assert_close(inside, outside)


def test_second_derivatives_are_refused():
    norm, (x,) = RMSNorm(16, 1e-5), inputs((4, 16), dtype=torch.float32)
    (slope,) = torch.autograd.grad(gated(norm(x), x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated(dtype: torch.dtype):
    require_equal(gated, lambda gate, up: F.silu(gate) * up, *inputs((3, 5, 16), (3, 5, 16), dtype=dtype))


def test_a_frozen_norm_passes_the_gradient_on():
    norm, (x,) = RMSNorm(16, 1e-5).requires_grad_(False), inputs((3, 16), dtype=torch.float32)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert (x.grad != 0).any()


def test_nothing_but_the_inputs_is_kept():
    kept = []
    norm, (x, up) = RMSNorm(16, 1e-5), inputs((3, 16), (3, 16), dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(norm(x), up)
    # Input, weight and one number a position of the norm; gate and up.
    assert sorted(t.numel() for t in kept) == [3, 16, 48, 48, 48]
