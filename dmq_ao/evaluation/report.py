"""The report of a quantization run: one table for the terminal, one self-contained page, the pictures beside them.

A report is a plain dict, as ``json`` reads and writes it::

    {"title": str, "model": str, "machine": {...},            # machine: as cost.machine() gives it
     "protocol": {...},                                       # optional: scheduler, steps, seeds ... shown as they are
     "float": {"file_bytes": int, "latency_ms": float | None},
     "variants": [{
        "name": str, "file_bytes": int, "size_ratio": float, "mean_bits": float, "one_step_error": float,
        "errors_by_timestep": {"timesteps": [...], "errors": [...]},
        "psnr_db": float, "psnr_std_db": float, "latency_ms": float | None, "speedup": float | None,
        "kernels": {"onednn int8 convolution": 30, ...},
        "layers": [{"name", "kind", "status", "weight_bits", "activation_bits", "kernel", "sqnr_db", "why"}],
        "kept_float": [{"name", "why"}]}]}

Only ``title``, ``variants`` and their names must be there: what is missing or None shows as a dash.
Pictures are ``{name: [N, C, H, W] in 0..1}`` with a row named ``float`` and the same seed in each column.
"""

import json
import math
import os
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

FLOAT = "float"
"""Name of the teacher's row, in the tables and among the pictures."""

DASH = "–"
COLUMNS = ("", "size", "smaller", "mean bits", "one-step error", "PSNR dB", "latency", "faster")
LAYER_COLUMNS = {
    "name": "layer",
    "kind": "kind",
    "status": "status",
    "weight_bits": "W bits",
    "activation_bits": "A bits",
    "kernel": "kernel",
    "sqnr_db": "SQNR dB",
    "why": "why",
}
CELL = 192  # pixels: small images are enlarged by whole factors up to about this
LIGHT = {"ink": "#1d2126", "soft": "#666d78", "line": "#e2e5ea", "page": "#ffffff"}
DARK = {"ink": "#e9ebee", "soft": "#9aa3af", "line": "#333a44", "page": "#191c21"}
LIGHT_LINES = ("#2a78d6", "#d9730d", "#0f9f76", "#8a4fd3", "#d6336c", "#7a6a00")
DARK_LINES = ("#6cabf7", "#f2a35e", "#4fd1a5", "#b894f4", "#f783ac", "#d3c04a")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Curve = tuple[str, list[float], list[float]]


def render_table(report: Mapping[str, Any]) -> str:
    """The figures as aligned plain text: the float model, then each variant, then the machine.

    Raises:
        ValueError: the report lacks a title or variants, or their names are missing or not distinct.
    """
    rows = [list(COLUMNS), *(_cells(entry) for entry in _entries(report))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    machine = _machine_line(report)
    return "\n".join([*lines, "", machine] if machine else lines)


def render_html(report: Mapping[str, Any], images: Mapping[str, Tensor]) -> str:
    """The whole report as one page that needs no other file and no network.

    Args:
        report: see the module's docstring.
        images: rows of the picture grid, ``[N, C, H, W]`` in 0..1; may be empty.

    Returns:
        An HTML document; it follows the reader's light or dark setting.

    Raises:
        ValueError: the report lacks a title or variants, their names are missing or not distinct, or the images have
            no float row, a row that is no variant, differing shapes or values outside 0..1.
        TypeError: the images are not floating point.
    """
    entries = _entries(report)
    title = escape(str(report["title"]))
    facts = " · ".join(escape(part) for part in (str(report.get("model") or ""), _machine_line(report)) if part)
    body = "".join(
        [
            f"<header><h1>{title}</h1><p>{facts}</p></header>",
            _section("Figures", _figures(entries), ""),
            _section("Pictures", _pictures(entries, images), "The same seed in every column."),
            _section("One-step error by timestep", _plot(entries), "One denoiser call on the float model's inputs."),
            _section("Layers", "".join(map(_layers, entries)), ""),
            _section("Kept in float", _kept_float(entries), "Their bits are counted in the mean bits."),
            _section("How this was measured", _facts(report), ""),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def image_grid(rows: Mapping[str, Tensor], scale: int | None = None) -> bytes:
    """One picture of all pictures: a labelled row for each name, a column for each seed.

    Args:
        rows: ``[N, C, H, W]`` in 0..1 with C 1 or 3, all of one shape, by label.
        scale: whole factor by which pixels are enlarged; None chooses one for small images.

    Returns:
        The bytes of a PNG file.

    Raises:
        ValueError: there are no rows, the shapes differ, or values lie outside 0..1.
        TypeError: the images are not floating point.
    """
    from PIL import Image, ImageDraw, ImageFont

    pixels = _pixel_rows(rows)
    if not pixels:
        raise ValueError("rows: wanted at least one row of images, got none")
    count, height, width = next(iter(pixels.values())).shape[:3]
    scale = scale or max(1, CELL // max(height, width))
    height, width, gap = height * scale, width * scale, 4
    font = ImageFont.load_default(size=16)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    gutter = 2 * gap + max(math.ceil(measure.multiline_textbbox((0, 0), name, font=font)[2]) for name in pixels)
    grid = Image.new("RGB", (gutter + count * (width + gap), gap + len(pixels) * (height + gap)), LIGHT["page"])
    draw = ImageDraw.Draw(grid)
    for row, (name, images) in enumerate(pixels.items()):
        top = gap + row * (height + gap)
        draw.multiline_text((gap, top + height // 2), name, fill=LIGHT["ink"], font=font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (gutter + column * (width + gap), top))
    buffer = BytesIO()
    grid.save(buffer, "PNG")
    return buffer.getvalue()


def write_report(
    report: Mapping[str, Any], images: Mapping[str, Tensor], folder: str | os.PathLike[str]
) -> dict[str, Path]:
    """Write ``report.json``, ``report.html``, ``grid.png`` and ``error_by_timestep.png``, each whole or not at all.

    Everything is rendered before the first file is written. Numbers that JSON does not know become the strings
    ``"inf"``, ``"-inf"`` and ``"nan"``, which the other functions here read. Without images there is no grid; without
    errors by timestep, or without matplotlib, no plot.

    Args:
        report: see the module's docstring.
        images: rows of the picture grid, ``[N, C, H, W]`` in 0..1; may be empty.
        folder: made if it is not there.

    Returns:
        The path of each file that was written, by its name.

    Raises:
        ValueError: as ``render_html``.
        TypeError: as ``render_html``, or the report holds what JSON cannot.
    """
    entries = _entries(report)
    files = {
        "report.json": json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False).encode(),
        "report.html": render_html(report, images).encode(),
    }
    if images:
        rows, captions = _in_order(entries, images), _captions(entries)
        files["grid.png"] = image_grid({f"{name}\n{captions[name]}": row for name, row in rows.items()})
    curves = _curves(entries)
    if curves and _can_plot():
        files["error_by_timestep.png"] = _error_plot(curves, "png", dark=False)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return {name: _write(target / name, content) for name, content in files.items()}


# Reading a report


def _entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The float model and the variants as rows of one table."""
    missing = [key for key in ("title", "variants") if not report.get(key)]
    if missing:
        raise ValueError(f"report: wanted 'title' and at least one of 'variants', got no {' and no '.join(missing)}")
    names = [variant.get("name") for variant in report["variants"]]
    if not all(names) or len({FLOAT, *names}) != len(names) + 1:
        raise ValueError(f"report: wanted variants with distinct names other than {FLOAT!r}, got {names}")
    teacher = dict(report.get("float") or {})
    same = {"size_ratio": 1.0, "speedup": None if teacher.get("latency_ms") is None else 1.0}
    return [{**same, **teacher, "name": FLOAT}, *(dict(variant) for variant in report["variants"])]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    """One row of the table: a text for each of ``COLUMNS``."""
    return [
        str(entry["name"]),
        _size(entry.get("file_bytes")),
        _number(entry.get("size_ratio"), ".2f", "×"),
        _number(entry.get("mean_bits"), ".2f"),
        _number(entry.get("one_step_error"), ".3g"),
        _psnr(entry),
        _number(entry.get("latency_ms"), ".2f", " ms"),
        _number(entry.get("speedup"), ".2f", "×"),
    ]


def _number(value: float | str | None, form: str, unit: str = "") -> str:
    if value is None or math.isnan(float(value)):
        return DASH
    if math.isinf(float(value)):
        return "∞" if float(value) > 0 else "-∞"
    return format(float(value), form) + unit


def _size(count: float | None) -> str:
    """Bytes in decimal units, as disks and downloads count them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count is not None and count >= size:
            return _number(count / size, ".2f", f" {unit}")
    return _number(count, ".0f", " B")


def _psnr(entry: Mapping[str, Any]) -> str:
    mean, spread = _number(entry.get("psnr_db"), ".2f"), _number(entry.get("psnr_std_db"), ".2f")
    return mean if DASH in (mean, spread) else f"{mean} ± {spread}"


def _machine_line(report: Mapping[str, Any]) -> str:
    machine = report.get("machine") or {}
    parts = (
        machine.get("gpu"),
        machine.get("cpu"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        f"{machine['threads']} threads" if machine.get("threads") else None,
        f"torch {machine['torch']}" if machine.get("torch") else None,
        machine.get("capability"),
        "VNNI" if machine.get("vnni") else None,
    )
    return " · ".join(str(part) for part in parts if part)


def _curves(entries: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """The points that a logarithmic axis can show, by rising timestep."""
    curves = []
    for entry in entries:
        by_timestep = entry.get("errors_by_timestep") or {"timesteps": (), "errors": ()}
        pairs = zip(map(float, by_timestep["timesteps"]), map(float, by_timestep["errors"]), strict=True)
        points = sorted((timestep, error) for timestep, error in pairs if error > 0 and math.isfinite(error))
        if points:
            curves.append((entry["name"], [point[0] for point in points], [point[1] for point in points]))
    return curves


def _plain(value: Any) -> Any:
    """The same value with strings for the numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


# Pictures


def _in_order(entries: Iterable[Mapping[str, Any]], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows in the order of the table."""
    names = [entry["name"] for entry in entries]
    unknown = sorted(images.keys() - set(names))
    if unknown:
        raise ValueError(f"images: wanted rows named like the variants, {names}, got {unknown} besides")
    if FLOAT not in images:
        raise ValueError(f"images: wanted a row named {FLOAT!r} to compare with, got {sorted(images)}")
    return {name: images[name] for name in names if name in images}


def _captions(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What stands under the name of a row of pictures: its PSNR."""
    captions = {entry["name"]: _number(entry.get("psnr_db"), ".1f", " dB") for entry in entries}
    return {**captions, FLOAT: "reference"}


def _pixel_rows(rows: Mapping[str, Tensor]) -> dict[str, Pixels]:
    """Each row as ``[N, H, W, 3]`` bytes."""
    shapes = {name: list(images.shape) for name, images in rows.items()}
    first = next(iter(shapes.values()), [])
    for name, shape in shapes.items():
        if len(shape) != 4 or 0 in shape or shape[1] not in (1, 3):
            raise ValueError(f"images {name!r}: wanted [N, C, H, W] with C 1 or 3, got {shape}")
        if shape != first:
            raise ValueError(f"images {name!r}: wanted the shape of the first row, {first}, got {shape}")
    return {name: _pixels(name, images) for name, images in rows.items()}


def _pixels(name: str, images: Tensor) -> Pixels:
    if not images.is_floating_point():
        raise TypeError(f"images {name!r}: wanted floating point in 0..1, got {images.dtype}")
    values = images.detach().cpu().float()
    low, high = values.min().item(), values.max().item()
    if not (low >= -0.01 and high <= 1.01):  # a little overshoot is rounding; -1..1 is another convention
        raise ValueError(f"images {name!r}: wanted values in 0..1, got {low:.3g}..{high:.3g}")
    bytes_ = values.clamp(0, 1).mul(255).round().byte()
    return bytes_.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def _png(image: Pixels) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def _can_plot() -> bool:
    return find_spec("matplotlib") is not None


def _error_plot(curves: Sequence[Curve], kind: str, dark: bool) -> bytes:
    """Relative error over timesteps on a logarithmic axis, a line for each variant; the same bytes each time."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    theme, colors = (DARK, DARK_LINES) if dark else (LIGHT, LIGHT_LINES)
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor=theme["page"])
    axes = figure.add_subplot(facecolor=theme["page"])
    for index, (name, timesteps, errors) in enumerate(curves):
        style = ("-", "--", ":")[index // len(colors) % 3]
        label = name.replace("$", r"\$")  # a name is text, not mathematics
        axes.plot(timesteps, errors, style, color=colors[index % len(colors)], label=label, marker="o", markersize=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("timestep", color=theme["soft"])
    axes.set_ylabel("relative error", color=theme["soft"])
    axes.grid(axis="y", color=theme["line"], linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme["line"])
    axes.tick_params(colors=theme["soft"], length=0)
    figure.legend(loc="outside upper left", ncols=min(4, len(curves)), frameon=False, labelcolor=theme["ink"])
    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "dmq_ao"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


# Parts of the page

FIGURES_NOTE = (
    "Mean bits count all weights, those kept in float with their full width. One-step error is ‖student − teacher‖ / "
    "‖teacher‖ of one denoiser call, mean over timesteps. PSNR compares with the float model's pictures of the same "
    "seeds, mean ± standard deviation over pictures. Latency is the median of one denoiser call."
)


def _section(title: str, body: str, note: str) -> str:
    """A titled part of the page; none where there is nothing to show."""
    if not body:
        return ""
    above = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{above}{body}</section>\n"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """``header`` and ``rows`` are text, not HTML; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = (
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _figures(entries: Iterable[Mapping[str, Any]]) -> str:
    return _table(COLUMNS, map(_cells, entries), "figures") + f'<p class="note below">{FIGURES_NOTE}</p>'


def _pictures(entries: Sequence[Mapping[str, Any]], images: Mapping[str, Tensor]) -> str:
    if not images:
        return ""
    rows, captions = _pixel_rows(_in_order(entries, images)), _captions(entries)
    count, height, width = next(iter(rows.values())).shape[:3]
    small = " small" if max(height, width) < CELL else ""
    lines = "".join(_picture_row(name, captions[name], pixels) for name, pixels in rows.items())
    return f'<div class="pictures scroll{small}" style="--columns:{count}">{lines}</div>'


def _picture_row(name: str, caption: str, pixels: Pixels) -> str:
    height, width = pixels.shape[1:3]
    cells = "".join(
        f'<img src="{_data_uri(_png(image), "png")}" width="{width}" height="{height}" '
        f'alt="{escape(name)}, picture {column + 1}">'
        for column, image in enumerate(pixels)
    )
    return f'<div class="row"><div class="label"><b>{escape(name)}</b><span>{caption}</span></div>{cells}</div>'


def _plot(entries: Iterable[Mapping[str, Any]]) -> str:
    curves = _curves(entries)
    if not curves:
        return ""
    if not _can_plot():
        return "<p>The plot needs matplotlib: pip install 'dmq-ao[report]'.</p>"
    light, dark = (_data_uri(_error_plot(curves, "svg", dark), "svg+xml") for dark in (False, True))
    names = escape(", ".join(name for name, _, _ in curves))
    return (
        f'<div class="scroll"><picture class="plot"><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="Relative error over timesteps of {names}"></picture></div>'
    )


def _layers(entry: Mapping[str, Any]) -> str:
    """What a variant's layers became: a line of kernels, and a table that opens."""
    kernels = "".join(
        f"<li><b>{escape(str(count))}</b> {escape(kernel)}</li>"
        for kernel, count in (entry.get("kernels") or {}).items()
    )
    layers = entry.get("layers") or ()
    if not kernels and not layers:
        return ""
    chips = f'<ul class="chips">{kernels}</ul>' if kernels else ""
    opens = f"<details><summary>{len(layers)} layers</summary>{_layer_table(layers)}</details>" if layers else ""
    return f"<h3>{escape(entry['name'])}</h3>{chips}{opens}"


def _layer_table(layers: Iterable[Mapping[str, Any]]) -> str:
    return _table(LAYER_COLUMNS.values(), ([_layer_cell(layer, key) for key in LAYER_COLUMNS] for layer in layers), "")


def _layer_cell(layer: Mapping[str, Any], key: str) -> str:
    value = layer.get(key)
    if value is None or value == "":
        return DASH
    if key == "sqnr_db":
        return _number(value, ".1f")
    return _number(value, "g") if isinstance(value, float) else str(value)


def _kept_float(entries: Iterable[Mapping[str, Any]]) -> str:
    """Layers by reason; variants that keep the same layers share a table."""
    variants: dict[str, list[str]] = {}
    for entry in entries:
        if entry.get("kept_float"):
            variants.setdefault(_kept_table(entry["kept_float"]), []).append(str(entry["name"]))
    return "".join(f"<h3>{escape(', '.join(names))}</h3>{table}" for table, names in variants.items())


def _kept_table(kept: Iterable[Mapping[str, Any]]) -> str:
    reasons: dict[str, list[str]] = {}
    for layer in kept:
        reasons.setdefault(str(layer.get("why") or DASH), []).append(str(layer["name"]))
    rows = [(why, str(len(names)), ", ".join(names)) for why, names in reasons.items()]
    return _table(("why", "count", "layers"), rows, "kept")


def _facts(report: Mapping[str, Any]) -> str:
    facts = {**(report.get("protocol") or {}), **(report.get("machine") or {})}
    items = (f"<dt>{escape(str(key))}</dt><dd>{escape(_fact(value))}</dd>" for key, value in facts.items())
    return f"<dl>{''.join(items)}</dl>" if facts else ""


def _fact(value: object) -> str:
    if value is None or value == "":
        return DASH
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #666d78; --line: #e2e5ea; --page: #f5f6f8; --card: #fff;
  --accent: #2a78d6; --hover: #f5f8fd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ebee; --soft: #9aa3af; --line: #333a44; --page: #111317;
  --card: #191c21; --accent: #6cabf7; --hover: #20252d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { margin: 0 .25rem 1.5rem; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.02em; text-wrap: balance; }
header p { margin: .5rem 0 0; color: var(--soft); overflow-wrap: anywhere; }
section { margin: 0 0 1rem; padding: 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
h2 { margin: 0 0 .75rem; font-size: 1.05rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: .95rem; }
h2 + h3, .note + h3 { margin-top: 0; }
.note { max-width: 65rem; margin: -.5rem 0 1rem; color: var(--soft); font-size: .85rem; }
.below { margin: .75rem 0 0; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
th:first-child, td:first-child { padding-left: 0; }
th[scope=col] { color: var(--soft); font-size: .8rem; font-weight: 500; white-space: nowrap; }
th[scope=row] { font-weight: 600; }
tr:hover > td, tr:hover > th[scope=row] { background: var(--hover); }
.figures th, .figures td { white-space: nowrap; }
.figures td, .figures th[scope=col] { text-align: right; }
.kept td:last-child { overflow-wrap: anywhere; }
details { margin: .5rem 0; }
details th, details td { font-size: .82rem; }
details th[scope=row] { font-weight: 400; font-family: ui-monospace, Menlo, Consolas, monospace; }
summary { width: max-content; color: var(--accent); cursor: pointer; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0; padding: 0; list-style: none; }
.chips li { padding: .15rem .65rem; border: 1px solid var(--line); border-radius: 999px; font-size: .82rem; }
.row { display: grid; grid-template-columns: 9rem repeat(var(--columns), minmax(4rem, 16rem)); gap: 5px;
  align-items: center; margin-bottom: 5px; }
.label { position: sticky; left: 0; padding-right: .75rem; background: var(--card); line-height: 1.35; }
.label b { display: block; overflow-wrap: anywhere; }
.label span { color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; }
.row img { display: block; width: 100%; height: auto; border-radius: 4px; }
.small img { image-rendering: pixelated; }
.plot img { display: block; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding-top: 1.25rem; } section { padding: 1rem; }
  .plot img { min-width: 36rem; }
  .row { grid-template-columns: repeat(var(--columns), minmax(3.5rem, 16rem)); margin-bottom: .75rem; }
  .label { grid-column: 1 / -1; display: flex; gap: .6rem; align-items: baseline; } }
"""


# Files


def _write(path: Path, content: bytes) -> Path:
    """A reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
