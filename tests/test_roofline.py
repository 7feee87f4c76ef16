"""Integer work of a call counted by hand, and a peak that is a number."""

from __future__ import annotations

import dataclasses

import pytest
from plain import Plain, flow, plain_samples, seeded

from dmq_ao import recipes
from dmq_ao.backends.onednn import self_test
from dmq_ao.benchmarks.roofline import int8_peak, integer_macs
from dmq_ao.config import Override
from tests.integer_sums import needs_exact_sums

PIXELS = 8 * 8
CONV, TOKENS, MERGE = 16 * 16 * 9, 16 * 16, 32 * 16  # Plain's quantized layers; its first and last stay in float


@needs_exact_sums
@pytest.mark.parametrize("rows", [2, 4])
def test_work_is_that_of_the_integer_layers(rows: int) -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    quantized, _ = flow(net, recipes.minmax("w8a8"), samples, "onednn")
    assert integer_macs(quantized, samples.example(rows)) == rows * PIXELS * (CONV + TOKENS + MERGE)


@needs_exact_sums
def test_wide_inputs_count_once_a_byte() -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    recipe = recipes.minmax("w8a8")
    wide = dataclasses.replace(recipe.config.activation, bits=12)
    config = dataclasses.replace(recipe.config, overrides=(Override("conv", activation=wide),))
    quantized, _ = flow(net, dataclasses.replace(recipe, config=config), samples, "onednn")
    assert integer_macs(quantized, samples.example(2)) == 2 * PIXELS * (2 * CONV + TOKENS + MERGE)


def test_float_products_are_no_integer_work() -> None:
    net = seeded(Plain)
    samples = plain_samples(net)
    quantized, _ = flow(net, recipes.minmax("w8a8"), samples, "reference")
    assert integer_macs(quantized, samples.example(2)) == 0


@needs_exact_sums
def test_the_peak_is_that_of_the_best_shape() -> None:
    peak = int8_peak(repeats=1)
    assert peak is not None
    assert 1e8 < peak < 1e16


def test_without_right_integer_sums_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "sums", lambda word: self_test.Sums.WRONG)
    assert int8_peak() is None
