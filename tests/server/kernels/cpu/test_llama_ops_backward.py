import pytest
import torch

from server.kernels.cpu.llama_ops import RmsNorm, rms_norm_reference, silu_times_reference
from server.kernels.cpu.llama_ops_backward import norm_gradient, silu_times_gradients
from server.kernels.cpu.openmp import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="these kernels run on OpenMP")

SHAPES = [(1, 16), (3, 576), (130, 576)]  # on one thread, and on all


def by_autograd(y: torch.Tensor, upon: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, inputs, upon)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("summed", [False, True])
def test_a_norms_gradient_is_its_twins(shape: tuple[int, int], summed: bool) -> None:
    torch.manual_seed(0)
    x, upon, more = (torch.randn(shape) for _ in range(3))
    weight = torch.randn(shape[1])
    x.requires_grad_()
    (expected,) = by_autograd(rms_norm_reference(x, weight, 1e-5), upon, x)
    found = norm_gradient(RmsNorm(weight, 1e-5), x.detach(), upon, more if summed else None)
    torch.testing.assert_close(found, expected + more if summed else expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_silu_times_are_its_twins(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate, up, upon = (3 * torch.randn(shape) for _ in range(3))
    gate[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -30.0])
    gate.requires_grad_()
    up.requires_grad_()
    expected = by_autograd(silu_times_reference(gate, up), upon, gate, up)
    found = silu_times_gradients(gate.detach(), up.detach(), upon)
    torch.testing.assert_close(found, expected)


def test_what_is_no_number_stays_none() -> None:
    x = torch.ones(1, 16)
    x[0, 3] = torch.nan
    assert norm_gradient(RmsNorm(torch.ones(16), 1e-5), x, torch.ones(1, 16)).isnan().all()
    of_gate, of_up = silu_times_gradients(x, x, torch.ones(1, 16))
    assert of_gate[0, 3].isnan()
    assert of_up[0, 3].isnan()
