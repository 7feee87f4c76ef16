"""Calls of a quantized denoiser: wrong arguments, other dtypes, rows that are not finite, batches of none."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain import STEPS, Plain, flow, plain_samples, record, relative, seeded
from torch import Tensor, nn

import dmq_ao
from dmq_ao import CalibrationSet, QuantizedDenoiser, Ranges

BACKENDS = ("reference", "auto")
STATIC, PER_STEP = (dmq_ao.recipes.minmax("w8a8", ranges=ranges) for ranges in (Ranges.STATIC, Ranges.PER_STEP))
X, T = torch.linspace(-2, 2, 3 * 3 * 64).reshape(3, 3, 8, 8).sin(), torch.tensor(STEPS[:3])


@dataclasses.dataclass
class Answer:
    """What the denoiser below returns."""

    sample: Tensor
    extra: Tensor


class Guided(nn.Module):
    """A denoiser with text, a mask over it, one shared vector and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.text, self.time = nn.Linear(8, 16), nn.Linear(1, 16)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        shift: Any = None,
        flag: bool = False,
        return_dict: bool = True,
    ) -> Any:
        h = self.first(x) + self.time(t.to(x.dtype)[:, None] / 1000)[:, None]
        weights = h @ self.text(text).transpose(1, 2)
        h = h + (weights if mask is None else weights + mask[:, None]).softmax(-1) @ self.text(text)
        h = h if shift is None else h + shift["by"]
        answers = self.last(self.middle(h).relu()), h
        return Answer(*answers) if return_dict else answers


@pytest.fixture(scope="module")
def by_backend(model: nn.Module, samples: CalibrationSet) -> dict[str, QuantizedDenoiser]:
    prepared = dmq_ao.prepare(model, PER_STEP, samples.example(), backend="reference")
    dmq_ao.calibrate(prepared, samples, progress=False)
    return {backend: dmq_ao.convert(prepared, backend) for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def denoiser(request: pytest.FixtureRequest, by_backend: dict[str, QuantizedDenoiser]) -> QuantizedDenoiser:
    return by_backend[request.param]


def guided_inputs(rows: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(rows, 5)
    mask[:, 3:] = -torch.inf
    return {
        "x": torch.randn(rows, 6, 8, generator=generator),
        "t": torch.tensor(STEPS)[torch.arange(rows) % 4],
        "text": torch.randn(rows, 5, 8, generator=generator),
        "mask": mask,
        "shift": {"by": torch.randn(16, generator=generator)},
    }


@pytest.fixture(scope="module")
def guided() -> QuantizedDenoiser:
    model = seeded(Guided)
    return dmq_ao.convert(dmq_ao.prepare(model, dmq_ao.recipes.minmax("w8a16"), guided_inputs()), "reference")


@pytest.fixture(autouse=True)
def _cast_warnings_are_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the quantized denoiser computes in")
        yield


# --- arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: q(X, T, 3), r"takes 2 positional arguments, \['x', 't'\], got 3"),
        (lambda q: q(X, T, None, False), r"takes 2 positional arguments, \['x', 't'\], got 4"),
        (lambda q: q(X, x=X, t=T), "argument 'x' was passed twice, by position and by name"),
        (lambda q: q(X, T, t=T), "argument 't' was passed twice"),
        (lambda q: q(X, T, tt=None), "argument 'tt' was not among the example inputs, and is none of .*'x', 't'"),
        (lambda q: q(X, T, return_dict=False), "argument 'return_dict' was not among the example inputs"),
        (lambda q: q(X, timesteps=T), "argument 'timesteps' was not among"),
        (lambda q: q(), "missing argument 'x'"),
        (lambda q: q(X), "missing argument 't'"),
        (lambda q: q(X, None), "missing argument 't'"),
        (lambda q: q(X.tolist(), T), "argument 'x.0.0.0.0' was not among|missing argument 'x'"),
        (lambda q: q(X, "900"), "argument 't' must be a number or a tensor, got str '900'"),
        (lambda q: q(X, True), "argument 't' must be a number or a tensor, got bool"),
        (lambda q: q(X > 0, T), "argument 'x' must be torch.float32, got torch.bool"),
        (lambda q: q(X.to(torch.complex64), T), "argument 'x' must be torch.float32, got torch.complex64"),
    ],
)
def test_wrong_arguments_are_named(denoiser: QuantizedDenoiser, call: Callable[..., Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        call(denoiser)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"flag": True}, TypeError, "argument 'flag' was not among the example inputs, so .* prepare again with it"),
        ({"flag": torch.ones(1)}, TypeError, "argument 'flag' was not among the example inputs"),
        ({"shift": torch.ones(16)}, TypeError, "missing argument 'shift.by'"),
        ({"shift": {"by": torch.ones(16), "of": torch.ones(1)}}, TypeError, "argument 'shift.of' was not among"),
        ({"mask": None}, TypeError, "missing argument 'mask'"),
        ({"mask": torch.ones(3, 5) > 0}, TypeError, "argument 'mask' must be torch.float32, got torch.bool"),
        ({"text": torch.ones(3, 8)}, ValueError, "argument 'text' must have 3 dimensions"),
        ({"text": torch.ones(3, 5, 8, device="meta")}, ValueError, "argument 'text' is on meta, the denoiser on cpu"),
        ({"t": torch.ones(3, 1)}, ValueError, r"argument 't' must have a number for each row \[B\], .* \(3, 1\)"),
    ],
)
def test_wrong_nested_arguments_are_named(
    guided: QuantizedDenoiser, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        guided(**guided_inputs() | change)


def test_arguments_of_any_name_stay_possible_where_the_model_takes_them() -> None:
    class Loose(Plain):
        def forward(self, x: Tensor, t: Tensor, **rest: Any) -> Tensor:
            return super().forward(x + rest["bias"], t)

    inputs = {"x": X, "t": T, "bias": torch.ones(3, 1, 1, 1)}
    denoiser = dmq_ao.convert(dmq_ao.prepare(seeded(Loose), dmq_ao.recipes.minmax("w8a16"), inputs), "reference")
    assert torch.equal(denoiser(**inputs, later=None), denoiser(X, T, bias=inputs["bias"]))
    with pytest.raises(TypeError, match="argument 'later' was not among the example inputs"):
        denoiser(**inputs, later=1)


# --- batches of none ---------------------------------------------------------


def test_a_batch_of_none_has_an_empty_answer(denoiser: QuantizedDenoiser) -> None:
    for timestep in (T[:0], 600, torch.tensor(600), torch.tensor([600])):
        answer = denoiser(X[:0], timestep)
        assert (answer.shape, answer.dtype) == (torch.Size([0, 3, 8, 8]), torch.float32)
    assert denoiser(torch.zeros(0, 3, 16, 12), 600).shape == (0, 3, 16, 12)
    assert denoiser(X[:0].bfloat16(), 600).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="do not fit the exported graph"):
        denoiser(torch.zeros(0, 5, 8, 8), 600)


def test_a_batch_of_none_keeps_the_form_of_the_answer(guided: QuantizedDenoiser) -> None:
    answer = guided(**guided_inputs(rows=0))
    assert type(answer) is Answer
    assert (answer.sample.shape, answer.extra.shape) == ((0, 6, 8), (0, 6, 16))


# --- rows that are not finite ------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_comes_out_as_nan(denoiser: QuantizedDenoiser, value: float) -> None:
    x, expected = X.clone(), denoiser(X, T)
    x[1, 2, 3, 4] = value
    answer = denoiser(x, T)
    assert answer[1].isnan().all()
    assert not answer[[0, 2]].isnan().any()
    assert relative(answer[[0, 2]], expected[[0, 2]]) < 0.02
    assert denoiser(X, torch.tensor(value)).isnan().all()
    assert torch.equal(denoiser(X, T).isnan().any(), torch.tensor(False))


def test_nan_in_every_argument_reaches_every_output(guided: QuantizedDenoiser) -> None:
    inputs = guided_inputs()
    finite = guided(**inputs)
    assert not finite.sample.isnan().any()  # the mask's infinities are meant
    assert not finite.extra.isnan().any()
    for name in ("x", "text", "mask"):
        value = inputs[name].clone()
        value[2].view(-1)[0] = torch.nan
        answer = guided(**inputs | {name: value})
        for output in (answer.sample, answer.extra):
            assert output[2].isnan().all(), name
            assert not output[:2].isnan().any(), name
    answer = guided(**inputs | {"shift": {"by": torch.full((16,), torch.nan)}})
    assert answer.sample.isnan().all()
    assert answer.extra.isnan().all()


def test_compiled_calls_give_nan_too(by_backend: dict[str, QuantizedDenoiser]) -> None:
    x = X.clone()
    x[1, 0, 0, 0] = torch.nan
    with torch.no_grad():
        answer = dmq_ao.compile(by_backend["auto"])(x, T)
    assert answer[1].isnan().all()
    assert not answer[[0, 2]].isnan().any()


# --- other dtypes ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_cast_at_the_border(denoiser: QuantizedDenoiser, dtype: torch.dtype) -> None:
    answer = denoiser(X.to(dtype), T)
    assert answer.dtype == dtype
    assert torch.equal(answer, denoiser(X.to(dtype).float(), T).to(dtype))


def test_a_cast_is_told_once(model: nn.Module, samples: CalibrationSet) -> None:
    denoiser, _ = flow(model, STATIC, samples)
    with pytest.warns(UserWarning, match="computes in torch.float32: its inputs are cast from torch.bfloat16"):
        denoiser(X.bfloat16(), T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoiser(X.bfloat16(), T)
        denoiser(X, T)


def test_half_precision_takes_full(guided: QuantizedDenoiser) -> None:
    model = seeded(Plain).bfloat16()
    denoiser, _ = flow(model, STATIC, plain_samples(model, dtype=torch.bfloat16))
    assert denoiser(X, T).dtype == torch.float32
    inputs = guided_inputs()
    halved = guided(**inputs | {"text": inputs["text"].half()})  # an argument beside the sample
    assert (halved.sample.dtype, halved.extra.dtype) == (torch.float32, torch.float32)
    assert relative(halved.sample, guided(**inputs).sample) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_call_changes_nothing(denoiser: QuantizedDenoiser, dtype: torch.dtype) -> None:
    expected = denoiser(X, T)
    with torch.autocast("cpu", dtype):
        assert torch.equal(denoiser(X, T), expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(denoiser: QuantizedDenoiser, dtype: torch.dtype) -> None:
    expected, whole = denoiser(X, 600.7), denoiser(X, 999)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(denoiser(X, 600.7), expected)
        assert torch.equal(denoiser(X, 999), whole)
    finally:
        torch.set_default_dtype(before)


# --- timesteps ---------------------------------------------------------------


class Flow(Plain):
    """A denoiser of timesteps from 0 to 1, cast as pipelines in bfloat16 do."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t.to(x.dtype) * 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_that_the_pipeline_casts_find_their_row(dtype: torch.dtype) -> None:
    model = seeded(Flow).to(dtype)
    generator = torch.Generator().manual_seed(0)

    def call(step: int) -> None:
        model(torch.randn(4, 3, 8, 8, generator=generator).to(dtype), torch.full((4,), step / 1000).to(dtype))

    samples = record(model, call)
    denoiser, _ = flow(model, PER_STEP, samples)
    x = X.to(dtype)
    expected = denoiser(x, torch.full((3,), 0.6).to(dtype))
    assert torch.equal(denoiser(x, torch.full((3,), 0.6).to(dtype).float()), expected)
    assert torch.equal(denoiser(x, torch.tensor(0.6).to(dtype)), expected)
    assert relative(denoiser(x, 0.6), expected) < 0.05
    with torch.no_grad():
        assert relative(expected, model(x, torch.full((3,), 0.6).to(dtype))) < 0.1


def test_fractions_are_looked_up_as_the_nearest_row_and_embedded_as_they_are(
    model: nn.Module, denoiser: QuantizedDenoiser
) -> None:
    for timestep in (600.25, 299.5, 0.75, torch.tensor([899.9, 600.4, 1.5]), torch.tensor(600.25).half()):
        with torch.no_grad():
            t = torch.as_tensor(timestep).float().expand(3)
            assert relative(denoiser(X, timestep), model(X, t)) < 0.05
    assert not torch.equal(denoiser(X, 600.25), denoiser(X, 600))


def test_timesteps_that_are_indices_stay_whole() -> None:
    class Table(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.Embedding(1000, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x + self.steps(t)[:, :, None, None], t)

    model = seeded(Table)
    denoiser, _ = flow(model, STATIC, plain_samples(model))
    assert torch.equal(denoiser(X, 600.0), denoiser(X, 600))
    with pytest.raises(ValueError, match=r"argument 't' must be whole, .* got 600.5: the denoiser looks it up"):
        denoiser(X, 600.5)
