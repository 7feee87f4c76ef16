"""What the command line keeps quiet, what ``--debug`` shows, and patterns that are refused before any work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("typer")

from command_line import failure, run

from dmq_ao.cli import doctor, options
from dmq_ao.cli import output as cli_output
from dmq_ao.evaluation import render_table
from dmq_ao.pipelines import adapter
from dmq_ao.pipelines.layer_names import check_layer_patterns, nearest_names, weight_names

CHILD = "import os; print(os.environ.get('PYTHONWARNINGS'))"


def noisy_examine() -> dict[str, Any]:
    """As other libraries are: a logged warning at import, a deprecation, and one in a process of its own."""
    logging.getLogger("torchao").warning("Failed to load libtorchao.so: undefined symbol")
    warnings.warn("`torch_dtype` is deprecated", FutureWarning, stacklevel=1)
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout.strip()
    return {"findings": [{"level": "ok", "subject": "child", "text": child}], "integer_kernels": True, "healthy": True}


def test_other_libraries_are_quiet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "examine", noisy_examine)
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    result = run("doctor")
    assert (result.exit_code, result.stderr, caplog.text) == (0, "", "")
    assert "child  ignore" in result.stdout
    assert "PYTHONWARNINGS" not in os.environ
    with pytest.warns(FutureWarning, match="torch_dtype"):
        shown = run("doctor", "--debug")
    assert "Failed to load libtorchao.so" in caplog.text
    assert "child  None" in shown.stdout
    assert capfd.readouterr().err.count("deprecated") == 0


@pytest.mark.parametrize("before", ["error", ""])
def test_what_the_environment_asks_for_is_put_back(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", noisy_examine)
    monkeypatch.setenv("PYTHONWARNINGS", before)
    assert "child  ignore" in run("doctor").stdout
    assert os.environ["PYTHONWARNINGS"] == before


@pytest.mark.parametrize("debug", [False, True])
def test_loading_bars_are_hidden_of_both_libraries(debug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[str] = []
    for library in ("diffusers", "transformers"):
        logger = types.ModuleType(f"{library}.utils.logging")
        logger.disable_progress_bar = lambda library=library: hidden.append(library)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, logger.__name__, logger)
    monkeypatch.setattr(options, "find_spec", lambda library: object())
    monkeypatch.setattr(doctor, "examine", lambda: options.hide_loading_bars() or noisy_examine())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run("doctor", *(["--debug"] if debug else []))
    assert hidden == ([] if debug else ["diffusers", "transformers"])


def test_transformers_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda library: None)
    options.hide_loading_bars()


@pytest.mark.parametrize(
    ("size", "words"),
    [(25, "4.00x smaller than float32"), (100, "1.00x smaller"), (580, "5.80x larger than float32: the graph and")],
)
def test_a_file_that_grew_is_not_smaller(size: int, words: str) -> None:
    report = {"kept_layers": 0, "quantized_layers": 1, "mean_bits": 8.0, "file_bytes": size, "float_bytes": 100}
    recipe = {"name": "minmax", "config": {"power_of_two": None, "weight": {"bits": 8}, "activation": {"bits": 8}}}
    text = cli_output.totals_text({**report, "recipe": recipe})
    assert words in text
    table = render_table({"title": "t", "variants": [{"name": "v", "size_ratio": 100 / size}]})
    assert ("5.80× larger" in table) == (size > 100)


class Nested(nn.Module):
    """Layers by module, by parameter, and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        self.proj_out = nn.Conv2d(2, 2, 1)
        self.mix = nn.Parameter(self.proj_out.weight.detach()[:, :, 0, 0])


def test_names_of_layers_are_those_of_weights() -> None:
    assert sorted(weight_names(Nested())) == ["attention.to_k", "attention.to_q", "mix", "proj_out"]


@pytest.mark.parametrize(
    "pattern", ["*to_?", "attention.*", "proj_out", "proj_out.part1", "attention.to_q#2", "mix", "@input", "*.part?"]
)
def test_patterns_that_may_match_pass(pattern: str) -> None:
    check_layer_patterns(Nested(), [pattern])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "attention.to_qq",
            "pattern 'attention.to_qq' matches no layer of Nested; of 4 names the nearest are"
            " attention.to_q, attention.to_k",
        ),
        ("*to_w*", "nearest are attention.to_"),
        ("proj", "nearest are proj_out"),
        ("attention.norm", "matches no layer"),
        ("@inputs", r"unknown role '@inputs'; the roles are \['@input'"),
    ],
)
def test_patterns_that_cannot_match_name_the_nearest(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_layer_patterns(Nested(), ["*", pattern])


def test_nearest_are_few() -> None:
    names = [f"blocks.{index}.attn.to_q" for index in range(100)]
    assert nearest_names("*.12.attn.to_q*", names)[0] == "blocks.12.attn.to_q"
    assert len(nearest_names("x", names)) == 5


def test_a_pattern_is_refused_before_anything_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapter, "_run", lambda *args: pytest.fail("the sampler ran"))
    words = failure(2, "quantize", "demo", "-o", tmp_path / "out", "--keep-float", "mid_block.*to_qq")
    assert "'mid_block.*to_qq' matches no layer of UNet2DModel" in words
    assert "nearest are mid_block.attentions.0.to_q," in words
