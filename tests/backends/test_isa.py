"""Under every set of instructions a layer equals exact sums, or runs in float and says so."""

import pytest
import torch

from tests.isa import NAMES, layers_under


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="an x86 CPU is limited")
@pytest.mark.parametrize(
    "name", [name if name == "AVX2" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_layers_are_right_whatever_the_instructions(name: str) -> None:
    counts = layers_under(name, ["w8a8", "w4a8 votes", "w4a12"])
    assert counts["faults"] == []
    assert (counts["integer"], counts["float"]) in ((10, 5), (15, 0))  # of five kinds of layers; w8a8 may saturate
    exact = {verdict == "exact" for verdict in counts["sums"].values()}  # type: ignore[attr-defined]
    assert exact == {counts["float"] == 0}
