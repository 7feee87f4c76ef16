"""The report: the same figures in the terminal, on the page and in the files; nothing from outside the page."""

import base64
import json
import math
import os
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmq_ao.evaluation import image_grid, machine, pictures, render_html, render_table, write_report

NAMES = ("W8A8", "W4A8 + PTS", "<script>W4A4</script>")
VOID = {"meta", "img", "source", "br"}


def variant(name: str, error: float) -> dict[str, Any]:
    return {
        "name": name,
        "file_bytes": 2_500_000,
        "size_ratio": 3.68,
        "mean_bits": 4.87,
        "one_step_error": error,
        "errors_by_timestep": {"timesteps": [999.0, 500.0, 1.0], "errors": [error, error / 2, error / 4]},
        "psnr_db": 38.2134,
        "psnr_std_db": 1.3,
        "latency_ms": 12.5,
        "speedup": 2.4,
        "kernels": {"onednn int8 convolution": 30, "float <linear>": 2},
        "layers": [
            {"name": "mid.conv1", "kind": "conv2d", "status": "quantized", "weight_bits": 4, "activation_bits": 8}
            | {"kernel": "onednn int8 convolution", "sqnr_db": 31.26, "why": None},
            {"name": "conv_<in>", "kind": "conv2d", "status": "float", "why": "input convolution"},
        ],
        "kept_float": [{"name": "conv_<in>", "why": "input & output"}, {"name": "conv_out", "why": "input & output"}],
    }


@pytest.fixture
def full() -> dict[str, Any]:
    return {
        "title": "Demo <denoiser>",
        "model": "UNet2DModel & co",
        "machine": machine(),
        "protocol": {"scheduler": "DDIM", "steps": 20},
        "float": {"file_bytes": 9_200_000, "latency_ms": 30.0},
        "variants": [variant(name, 0.1 / (index + 1)) for index, name in enumerate(NAMES)],
    }


@pytest.fixture
def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(3, 1, 8, 8, generator=generator) for name in (*reversed(NAMES), "float")}


def bare() -> dict[str, Any]:
    """The least that is a report."""
    return {"title": "t", "variants": [{"name": "W4A4"}]}


class Page(HTMLParser):
    """Tags that balance, and the text, pictures and details of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(source)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def test_table_is_aligned_and_holds_the_figures(full: dict[str, Any]) -> None:
    header, rule, teacher, *variants, blank, machine_line = render_table(full).splitlines()
    assert " ".join(header.split()) == "size smaller mean bits one-step error PSNR dB latency faster"
    assert len({len(line) for line in (header, rule, teacher, *variants)}) == 1
    assert " ".join(teacher.split()) == "float 9.20 MB 1.00× – – – 30.00 ms 1.00×"
    assert " ".join(variants[0].split()) == "W8A8 2.50 MB 3.68× 4.87 0.1 38.21 ± 1.30 12.50 ms 2.40×"
    assert [line.startswith(name) for line, name in zip(variants, NAMES, strict=True)] == [True] * 3
    assert blank == ""
    assert f"torch {torch.__version__}" in machine_line


def test_missing_values_are_dashes() -> None:
    sections = dict.fromkeys(["model", "machine", "protocol", "float"])
    assert render_html({**bare(), **sections}, {}) == render_html(bare(), {})
    *_, teacher, variant_line = render_table(bare()).splitlines()
    assert teacher.split() == ["float", "–", "1.00×", "–", "–", "–", "–", "–"]
    assert variant_line.split() == ["W4A4", *"–" * 7]
    page = Page(render_html(bare(), {}))
    assert "W4A4–––––––" in page.text
    assert "details" not in page.tags
    assert not page.images


@pytest.mark.parametrize(
    ("count", "text"), [(None, "–"), (7, "7 B"), (1500, "1.50 kB"), (63e6, "63.00 MB"), (2.5e9, "2.50 GB")]
)
def test_sizes_are_decimal(count: float | None, text: str) -> None:
    assert text in render_table({"title": "t", "float": {"file_bytes": count}, "variants": [{"name": "v"}]})


@pytest.mark.parametrize(("value", "text"), [(math.inf, "∞"), (-math.inf, "-∞"), (math.nan, "–"), ("inf", "∞")])
def test_numbers_that_are_not_finite(value: float | str, text: str) -> None:
    row = render_table({"title": "t", "variants": [{"name": "v", "psnr_db": value}]}).splitlines()[-1].split()
    assert row[5] == text


def test_page_shows_every_variant_and_escapes_names(full: dict[str, Any], images: dict[str, Tensor]) -> None:
    source = render_html(full, images)
    page = Page(source)
    for name in ("float", *NAMES, "Demo <denoiser>", "UNet2DModel & co", "conv_<in>", "float <linear>", "DDIM"):
        assert name in page.text
    assert "script" not in page.tags
    assert page.text.count("38.21 ± 1.30") == len(NAMES)


def test_page_needs_nothing_from_outside(full: dict[str, Any], images: dict[str, Tensor]) -> None:
    source = render_html(full, images)
    without_data = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "DATA", source)
    assert "http" not in source
    assert set(re.findall(r'(?:src|srcset|href)="([^"]*)"', without_data)) == {"DATA"}
    assert "url(" not in source
    assert "@import" not in source
    assert "prefers-color-scheme: dark" in source


def test_page_shows_the_pictures_float_first(full: dict[str, Any], images: dict[str, Tensor]) -> None:
    pictures = [image for image in Page(render_html(full, images)).images if "picture" in str(image["alt"])]
    assert [image["alt"] for image in pictures] == [
        f"{name}, picture {n}" for name in ("float", *NAMES) for n in (1, 2, 3)
    ]
    shown = np.asarray(decoded(pictures[1]["src"]))
    wanted = np.round(images["float"][1, 0].numpy() * 255)
    assert shown.shape == (8, 8, 3)
    assert (shown == wanted[..., None]).all()


def test_page_explains_layers_and_what_stays_float(full: dict[str, Any]) -> None:
    page = Page(render_html(full, {}))
    assert page.tags.count("details") == len(NAMES)
    assert "mid.conv1conv2dquantized48onednn int8 convolution31.3–" in page.text
    assert "conv_<in>conv2dfloat––––input convolution" in page.text
    assert page.text.count("input & output2conv_<in>, conv_out") == 1  # the three variants keep the same layers
    assert ", ".join(NAMES) in page.text


def test_page_is_the_same_each_time(full: dict[str, Any], images: dict[str, Tensor]) -> None:
    assert render_html(full, images) == render_html(full, images)


def test_plot_without_matplotlib_says_what_would_help(
    full: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    assert "The plot needs matplotlib: pip install 'dmq-ao[report]'." in Page(render_html(full, {})).text
    assert set(write_report(full, {}, tmp_path)) == {"report.json", "report.html"}


def test_plot_leaves_out_what_a_logarithm_cannot_show() -> None:
    errors = {"timesteps": [3, 2, 1, 0], "errors": [0.5, 0.0, "inf", 0.25]}
    entries = [{"name": "v", "errors_by_timestep": errors}, {"name": "w", "errors_by_timestep": None}]
    assert pictures.curves_of(entries) == [("v", [0.0, 3.0], [0.25, 0.5])]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"variants": [{"name": "v"}]}, "expected 'title' and at least one of 'variants', got no title"),
        ({"title": "t", "variants": []}, "got no variants"),
        ({}, "got no title and no variants"),
        ({"title": "t", "variants": [{}]}, r"variants with distinct names other than 'float', got \[None\]"),
        ({"title": "t", "variants": [{"name": "v"}, {"name": "v"}]}, r"distinct names .*, got \['v', 'v'\]"),
        ({"title": "t", "variants": [{"name": "float"}]}, r"distinct names .*, got \['float'\]"),
    ],
)
def test_reports_must_be_whole(broken: dict[str, Any], message: str) -> None:
    for render in (render_table, lambda broken: render_html(broken, {})):
        with pytest.raises(ValueError, match=message):
            render(broken)


IMAGE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"float": IMAGE, "W2A2": IMAGE}, r"named like the variants, \['float', 'W4A4'\], got \['W2A2'\] besides"),
        ({"W4A4": IMAGE}, r"images: expected a row named 'float' to compare with, got \['W4A4'\]"),
        (
            {"float": IMAGE, "W4A4": IMAGE[:1]},
            r"expected the shape of the first row, \[2, 3, 4, 4\], got \[1, 3, 4, 4\]",
        ),
        ({"float": IMAGE[:, :2]}, r"expected \[N, C, H, W\] with C 1 or 3, got \[2, 2, 4, 4\]"),
        ({"float": IMAGE[0]}, r"expected \[N, C, H, W\] with C 1 or 3, got \[3, 4, 4\]"),
        ({"float": IMAGE[:0]}, r"expected \[N, C, H, W\] with C 1 or 3, got \[0, 3, 4, 4\]"),
        ({"float": IMAGE - 1}, r"expected values in 0..1, got -1..-1"),
        ({"float": IMAGE + 2}, r"expected values in 0..1, got 2..2"),
        ({"float": IMAGE * math.nan}, r"expected values in 0..1, got nan..nan"),
    ],
)
def test_pictures_must_be_a_grid(rows: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_html(bare(), rows)


def test_pictures_must_be_floating_point() -> None:
    with pytest.raises(TypeError, match=r"images 'float': expected floating point in 0..1, got torch.uint8"):
        render_html(bare(), {"float": IMAGE.byte()})


def test_image_grid_enlarges_whole_pixels_in_order() -> None:
    rows = {"black": torch.zeros(2, 3, 5, 4), "grey": torch.full((2, 3, 5, 4), 0.5)}
    grid = np.asarray(Image.open(BytesIO(image_grid(rows, scale=3))))
    height, width, gap = 5 * 3, 4 * 3, 4
    assert grid.shape[0] == gap + 2 * (height + gap)
    right = grid[:, -(width + gap) : -gap]  # the last column of pictures
    assert (right[gap : gap + height] == 0).all()
    assert (right[2 * gap + height : -gap] == 128).all()
    assert (grid[:, -gap:] == 255).all()


def test_image_grid_chooses_a_scale_and_wants_rows() -> None:
    small, large = (Image.open(BytesIO(image_grid({"a": torch.zeros(1, 1, n, n)}))).height for n in (64, 256))
    assert (small, large) == (4 + 3 * 64 + 4, 4 + 256 + 4)
    with pytest.raises(ValueError, match="rows: expected at least one row of images, got none"):
        image_grid({})


def test_written_files_hold_the_report(full: dict[str, Any], images: dict[str, Tensor], tmp_path: Path) -> None:
    full["variants"][0] |= {"psnr_db": math.inf, "psnr_std_db": math.nan}
    folder = tmp_path / "new" / "folder"
    paths = write_report(full, images, folder)
    assert sorted(os.listdir(folder)) == sorted(paths) == sorted(path.name for path in paths.values())
    assert set(paths) == {"report.json", "report.html", "grid.png", "error_by_timestep.png"}
    read = json.loads(paths["report.json"].read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (read["variants"][0]["psnr_db"], read["variants"][0]["psnr_std_db"]) == ("inf", "nan")
    assert read["variants"][1:] == full["variants"][1:]
    assert render_html(read, images) == paths["report.html"].read_text(encoding="utf-8")
    for name in ("grid.png", "error_by_timestep.png"):
        Image.open(paths[name]).verify()


def test_a_failed_write_leaves_the_old_file(
    full: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(bare(), {}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(full, {}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_report({**bare(), "machine": {"cpu": object()}}, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
