"""The perceptron blocks of dlops.models beside their plain versions. Letters: rows, then the sizes of the layers."""

import torch
from torch import Tensor, nn

from bench.case import Problem, case
from dlops import models
from dlops.models import plain

NEURON = {"more_cpu": [(4096, 1024, 256)], "more_cuda": [(16384, 4096, 4096)], "label": "{}x{}->{}"}


def _problem(ours: nn.Module, eager: nn.Module, x: Tensor, products: float) -> Problem:
    """Weights and x once forward; backward reads them again and writes the weights' gradients."""
    eager.to(x)
    ours.to(x).load_state_dict(eager.state_dict())
    weights = sum(p.nbytes for p in eager.parameters())
    return Problem(
        dlops=ours,
        eager=eager,
        args=(x,),
        bytes=(weights + x.nbytes, 3 * weights + 2 * x.nbytes),
        flops=(products, 3 * products),
    )


@case(
    cpu=[(512, 768, 3072, 768)],
    cuda=[(8192, 4096, 16384, 4096)],
    more_cpu=[(256, 784, 512, 10), (1, 768, 3072, 768)],
    more_cuda=[(16, 4096, 16384, 4096), (256, 784, 512, 10)],
    label="{}x{}->{}->{}",
)
def mlp(device: torch.device, dtype: torch.dtype, rows: int, width: int, hidden: int, out: int) -> Problem:
    x = torch.randn(rows, width, device=device, dtype=dtype)
    sizes = [width, hidden, out]
    return _problem(models.MLP(sizes, "gelu"), plain.MLP(sizes, "gelu"), x, 2.0 * rows * hidden * (width + out))


@case(more_cpu=[(256, 784, 512, 10)], more_cuda=[(8192, 4096, 4096, 1024)], label="{}x{}->{}->{}, 2 pieces")
def maxout_network(device: torch.device, dtype: torch.dtype, rows: int, width: int, hidden: int, out: int) -> Problem:
    x = torch.randn(rows, width, device=device, dtype=dtype)
    sizes = [width, hidden, out]
    products = 2.0 * rows * hidden * (2 * width + out)
    return _problem(models.MaxoutNetwork(sizes), plain.MaxoutNetwork(sizes), x, products)


@case(directions=("forward",), **NEURON)
def mcculloch_pitts(device: torch.device, dtype: torch.dtype, rows: int, width: int, out: int) -> Problem:
    return _neurons(models.McCullochPitts(width, out), plain.McCullochPitts(width, out), device, dtype, rows)


@case(directions=("forward",), **NEURON)
def perceptron(device: torch.device, dtype: torch.dtype, rows: int, width: int, out: int) -> Problem:
    return _neurons(models.Perceptron(width, out), plain.Perceptron(width, out), device, dtype, rows)


def _neurons(ours: nn.Linear, eager: nn.Linear, device: torch.device, dtype: torch.dtype, rows: int) -> Problem:
    """Binary inputs and weights: every sum is exact, so no rounding decides on which side of the threshold it is."""
    with torch.no_grad():
        eager.weight.copy_(torch.randint(0, 2, eager.weight.shape) * 2 - 1)
        eager.bias.fill_(0.5)
    x = torch.randint(0, 2, (rows, eager.in_features)).to(device, dtype)
    return _problem(ours, eager, x, 2.0 * rows * eager.weight.numel())
