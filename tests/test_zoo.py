"""A few denoisers of the zoo, drawn by Hypothesis; ``make test-zoo`` looks at hundreds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import zoo_checks
from hypothesis import given, settings
from torch import Tensor
from zoo import SIZES, Spec, build, call, specs
from zoo_checks import Fault, examine

import dmq_ao


@settings(max_examples=3, derandomize=True, deadline=None)
@given(specs())
def test_drawn_denoisers_agree_or_are_refused_in_our_words(spec: Spec) -> None:
    outcome = examine(spec, compiled=False)
    assert outcome.result in ("agrees", "refused"), outcome


PLAIN = Spec("line", (("plain", "Mlp", 0),), "[B]", "positional", "tensor", (), "normal", "w8a8", "float32", 2, 0)


def test_a_bare_error_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **given: object) -> None:
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(dmq_ao, "calibrate", fail)
    outcome = examine(PLAIN)
    assert (outcome.result, outcome.stage) == ("fault", "calibrate")
    assert "RuntimeError" in outcome.why


def test_another_answer_is_a_fault() -> None:
    inputs = call(PLAIN, 1)
    net = build(PLAIN)

    def other(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t) * 1.01

    zoo_checks.same(PLAIN, net, net, "itself", inputs)
    with pytest.raises(Fault, match="off by 0.01"):
        zoo_checks.same(PLAIN, other, net, "other", inputs)


@pytest.mark.parametrize("form", SIZES)
def test_a_case_is_the_one_of_its_numbers(form: str) -> None:
    spec = dataclasses.replace(PLAIN, form=form)
    one, other = build(spec), build(spec)
    args, kwargs = call(spec, 3)
    assert torch.equal(one(*args, **kwargs), other(*args, **kwargs))
    assert torch.equal(call(spec, 3)[0][0], args[0])
    assert not torch.equal(call(spec, 2)[0][0], args[0])


def test_what_is_refused_in_other_words_is_a_fault() -> None:
    words = "ValueError: parts.0: its input holds NaN or infinity; check the samples and the float denoiser"
    assert zoo_checks.may_refuse(words, {"float": "not finite"})
    assert not zoo_checks.may_refuse(words, {})
    assert not zoo_checks.may_refuse("ValueError: it cannot be done", {})
    refused = examine(dataclasses.replace(PLAIN, time="per token"))
    assert (refused.result, refused.stage) == ("refused", "record")
