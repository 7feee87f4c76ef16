"""What of oneDNN's sums is exact is found by making them, once a process, and said."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmq_ao.backends.backend import BROKEN, OK, SLOW
from dmq_ao.backends.onednn import cpu, self_test
from dmq_ao.backends.onednn.pair_sums import INT16, sums_of_two
from dmq_ao.backends.onednn.self_test import WORDS, Limits, Sums, Word, findings, sums
from dmq_ao.backends.registry import ALL_BACKENDS, choose_backend
from tests.integer_sums import needs_exact_sums, needs_integers

ONEDNN = ALL_BACKENDS["onednn"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _again() -> Iterator[None]:
    sums.cache_clear()
    yield
    sums.cache_clear()


def saturate(word: Word, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an operator miss sums of codes of which two products may be beyond ``most``."""
    name = f"_{word}_sums"
    right = getattr(self_test, name)

    def wrong(shape: tuple[int, ...], limits: Limits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        actual, exact = right(shape, limits, generator)
        largest, low, high = limits
        return actual + (2 * largest * max(-low, high) > most), exact

    monkeypatch.setattr(self_test, name, wrong)


@needs_exact_sums
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("most", "expected"), [(2**15, Sums.PAIRS), (0, Sums.WRONG), (2**20, Sums.EXACT)])
def test_the_verdict_is_of_each_operator_alone(
    word: Word, most: int, expected: Sums, monkeypatch: pytest.MonkeyPatch
) -> None:
    saturate(word, most, monkeypatch)
    assert {one: sums(one) for one in WORDS} == {one: Sums.EXACT for one in WORDS} | {word: expected}
    assert ONEDNN.multiplies_integers()  # the other one does
    assert choose_backend("auto", torch.device("cpu"), {}) is ONEDNN


@needs_integers
def test_a_verdict_is_made_once_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.process_time()
    verdicts = [sums(word) for word in WORDS]
    assert time.process_time() - start < 1  # tens of milliseconds, on a machine that does nothing else
    monkeypatch.setattr(self_test, "_misses", lambda *args: pytest.fail("asked again"))
    assert [sums(word) for word in WORDS] == verdicts


def test_a_verdict_is_not_made_at_import() -> None:
    code = (
        "import dmq_ao.backends.registry, dmq_ao.backends.onednn.self_test as t;"
        "print(t.sums.cache_info().currsize, t.sums.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split()[-2:] == ["0", "0"]


@needs_integers
def test_a_verdict_does_not_depend_on_the_defaults_of_the_process() -> None:
    before = [sums(word) for word in WORDS]
    sums.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert [sums(word) for word in WORDS] == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_build_without_kernels_has_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_kernels", lambda: False)
    assert not ONEDNN.multiplies_integers()
    (finding,) = ONEDNN.examine()
    assert (finding.level, finding.subject) == (SLOW, "kernels")


@needs_exact_sums
def test_findings_say_what_was_decided_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one.level for one in findings()] == [OK, OK, OK]
    saturate("linear", 2**15, monkeypatch)
    saturate("convolution", 0, monkeypatch)
    sums.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    kernels, linear, convolution = findings()
    assert kernels.text.endswith("(onednn): linear")
    assert (linear.level, convolution.level) == (SLOW, BROKEN)
    assert (
        "exact only while any two products add up within int16: oneDNN uses no VNNI (ONEDNN_MAX_CPU_ISA=AVX2 is"
        in (linear.text)
    )
    assert "an int8 convolution makes " in convolution.text
    assert convolution.text.endswith("its layers run in float")
    saturate("linear", 0, monkeypatch)
    sums.cache_clear()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert [one.level for one in findings()] == [BROKEN] * 3
    assert not ONEDNN.multiplies_integers()
    assert ONEDNN.peak_products(torch.device("cpu")) == []


def test_a_kernel_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(self_test, "_linear_sums", fail)
    assert sums("linear") is Sums.WRONG
    texts = [one.text for one in findings() if one.level == BROKEN]
    assert any("an int8 linear fails: RuntimeError: could not create a primitive" in text for text in texts)


# ---------------------------------------------------------------------------------------------------------------------
# The bound itself

# Largest input code, smallest and largest weight, and whether two of their products fit.
WIDEST = [
    *[(255, -64, 64, True), (255, -65, 0, False), (255, 0, 65, False), (127, -128, 127, True), (128, -128, 0, True)],
    *[(129, -128, 0, False), (63, -64, 56, True), (255, -8, 7, True), (129, 0, 127, True), (130, 0, 127, False)],
]


@pytest.mark.parametrize(("largest", "low", "high", "fit"), WIDEST)
def test_the_widest_codes_that_two_products_allow(largest: int, low: int, high: int, fit: bool) -> None:
    weight = torch.tensor([[low, 0, low], [high, high, 0]], dtype=torch.int8)
    smallest, greatest = sums_of_two(weight, largest)
    assert (smallest, greatest) == (2 * largest * low, 2 * largest * high)
    assert (smallest >= INT16[0] and greatest <= INT16[1]) is fit


@pytest.mark.parametrize("shape", [(3, 1), (4, 5), (2, 3, 2, 2)])
def test_pair_sums_are_those_of_any_two_weights_of_one_output(shape: tuple[int, ...]) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int16)
    expected = [0, 0]
    for row in weight.flatten(1).tolist():
        for a, b in itertools.combinations([0, *row, 0], 2):
            for v, w in itertools.product((0, 37), (0, 37)):
                expected = [min(expected[0], a * v + b * w), max(expected[1], a * v + b * w)]
    assert list(sums_of_two(weight, 37)) == expected
