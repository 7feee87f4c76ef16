"""A plan is edited and read back; what is no plan is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmq_ao import BitPlan
from dmq_ao.config import InvalidFile
from dmq_ao.mixed_precision.bit_plan import InputBits, LayerBits

INPUTS = {"down.0": InputBits(900, 6), "up.1": InputBits(100, 8)}
PLAN = BitPlan({"down.0": LayerBits(9, (3, 3, 4)), "up.1": LayerBits(4, (2,))}, "error_gain", INPUTS)


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.integers(1, 99), st.lists(st.integers(1, 8), min_size=1))))
def test_a_dictionary_and_back(layers: dict[str, tuple[int, list[int]]]) -> None:
    plan = BitPlan({name: LayerBits(weights, tuple(bits)) for name, (weights, bits) in layers.items()})
    if layers:
        assert BitPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        numel = sum(weights * len(bits) for weights, bits in layers.values())
        assert plan.mean_bits == pytest.approx(sum(weights * sum(bits) for weights, bits in layers.values()) / numel)


def test_a_file_and_back(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (
        sum('"weights"' in line for line in (tmp_path / "plan.json").read_text().splitlines()) == 2
    )  # a layer a line
    assert torch.equal(PLAN.layers["down.0"].tensor(), torch.tensor([3, 3, 4], dtype=torch.uint8))


def test_the_summary_counts_channels() -> None:
    summary = PLAN.summary()
    assert summary["mean_bits"] == pytest.approx((9 * 10 + 4 * 2) / 31)
    assert (summary["mean_input_bits"], summary["inputs_by_bits"]) == (6.2, {"6": 1, "8": 1})
    assert BitPlan(PLAN.layers).mean_input_bits is None
    assert summary["layers"]["down.0"] == {"mean_bits": pytest.approx(10 / 3), "channels_by_bits": {"3": 2, "4": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a bit plan"),
        ("[]", "not a bit plan"),
        ('{"format": "other", "version": 1}', "format other 1|got other 1"),
        ('{"format": "dmq_ao.bit_plan", "version": 9}', "got dmq_ao.bit_plan 9"),
        ('{"format": "dmq_ao.bit_plan", "version": 1, "scorer": "x", "layers": {}}', "names no layer"),
        ('{"format": "dmq_ao.bit_plan", "version": 1, "scorer": "x", "layers": {"a": {"weights": 1}}}', "bits"),
        (
            '{"format": "dmq_ao.bit_plan", "version": 1, "scorer": "x", "layers": {"a": {"weights": 1, "bits": [9]}}}',
            "from 1 to 8, got 9",
        ),
        (
            '{"format": "dmq_ao.bit_plan", "version": 1, "scorer": "", "layers": {"": {"weights": 1, "bits": [0.5]}}}',
            "got float 0.5",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(InvalidFile, match=message):
        BitPlan.load(file)


def test_a_missing_file_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"search_bits\(...\).save\(file\) writes one"):
        BitPlan.load(tmp_path / "plan.json")
