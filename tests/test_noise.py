"""Noise has the shapes and types of the example inputs, in the graph's order, and is the same each time."""

import torch

from dmq_ao.graph import Signature
from dmq_ao.graph.noise import noise_tensors

SIGNATURE = Signature(
    parameters=("x", "t", "extra"),
    names=("x", "t", "extra.mask", "extra.size"),
    constants={},
    timestep="t",
    timestep_per_row=True,
    batch="x",
    return_type=None,
    returns_tuple=False,
    example={  # in another order, as a file gives it
        "extra.mask": ((2, 5), torch.bool),
        "extra.size": ((3,), torch.bfloat16),
        "t": ((2,), torch.float32),
        "x": ((2, 3, 4), torch.bfloat16),
    },
)


def test_noise_looks_like_the_example_inputs() -> None:
    inputs = noise_tensors(SIGNATURE)
    assert tuple(inputs) == SIGNATURE.names
    assert {name: (tuple(x.shape), x.dtype) for name, x in inputs.items()} == SIGNATURE.example
    assert torch.equal(inputs["t"], torch.ones(2))
    assert bool(inputs["extra.mask"].all())
    assert inputs["x"].float().std() > 0.5
    assert torch.equal(inputs["x"], noise_tensors(SIGNATURE)["x"])
    assert not torch.equal(inputs["x"], noise_tensors(SIGNATURE, seed=1)["x"])


def test_a_batch_size_is_that_of_all_inputs_with_rows() -> None:
    shapes = {name: tuple(x.shape) for name, x in noise_tensors(SIGNATURE, 7).items()}
    assert shapes == {"x": (7, 3, 4), "t": (7,), "extra.mask": (7, 5), "extra.size": (3,)}
