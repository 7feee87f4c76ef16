"""The report as one page that needs no other file and no network."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

from dmq_ao.evaluation import pictures
from dmq_ao.evaluation.table import COLUMNS, DASH, cells, entries_of, machine_line, number

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

FIGURES_NOTE = (
    "Mean bits count all weights, those kept in float with their full width. One-step error is ‖student − teacher‖ / "
    "‖teacher‖ of one denoiser call, mean over timesteps. PSNR compares with the float model's pictures of the same "
    "seeds, mean ± standard deviation over pictures. Latency is the median of one denoiser call."
)


def render_html(report: Mapping[str, Any], images: Mapping[str, Tensor]) -> str:
    """The whole report as one page that needs no other file and no network.

    Args:
        report: as ``dmq_ao.evaluation.report`` describes it.
        images: rows of the picture grid, ``[N, C, H, W]`` in 0..1; may be empty.

    Returns:
        An HTML document; it follows the reader's light or dark setting.

    Raises:
        ValueError: the report lacks a title or variants, their names are missing or not distinct, or the images have
            no float row, a row that is no variant, differing shapes or values outside 0..1.
        TypeError: the images are not floating point.
    """
    entries = entries_of(report)
    title = escape(str(report["title"]))
    facts = " · ".join(escape(part) for part in (str(report.get("model") or ""), machine_line(report)) if part)
    body = "".join(
        [
            f"<header><h1>{title}</h1><p>{facts}</p></header>",
            _section("Figures", _figures(entries), ""),
            _section("Pictures", _pictures(entries, images), "The same seed in every column."),
            _section("One-step error by timestep", _plot(entries), "One denoiser call on the float model's inputs."),
            _section("Layers", "".join(map(_layers, entries)), ""),
            _section("Kept in float", _float_layers(entries), "Their bits are counted in the mean bits."),
            _section("How this was measured", _facts_list(report), ""),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _section(title: str, body: str, note: str) -> str:
    """A titled part of the page; none where there is nothing to show."""
    if not body:
        return ""
    above = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{above}{body}</section>\n"


def _html_table(header: Iterable[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """``header`` and ``rows`` are text, not HTML; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = (
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _figures(entries: Iterable[Mapping[str, Any]]) -> str:
    return _html_table(COLUMNS, map(cells, entries), "figures") + f'<p class="note below">{FIGURES_NOTE}</p>'


def _pictures(entries: Sequence[Mapping[str, Any]], images: Mapping[str, Tensor]) -> str:
    if not images:
        return ""
    rows, captions = pictures.pixel_rows(pictures.in_order(entries, images)), pictures.captions_of(entries)
    count, height, width = next(iter(rows.values())).shape[:3]
    small = " small" if max(height, width) < pictures.CELL else ""
    lines = "".join(_picture_row(name, captions[name], pixels) for name, pixels in rows.items())
    return f'<div class="pictures scroll{small}" style="--columns:{count}">{lines}</div>'


def _picture_row(name: str, caption: str, pixels: pictures.Pixels) -> str:
    height, width = pixels.shape[1:3]
    cells = "".join(
        f'<img src="{pictures.data_uri(pictures.png(image), "png")}" width="{width}" height="{height}" '
        f'alt="{escape(name)}, picture {column + 1}">'
        for column, image in enumerate(pixels)
    )
    return f'<div class="row"><div class="label"><b>{escape(name)}</b><span>{caption}</span></div>{cells}</div>'


def _plot(entries: Iterable[Mapping[str, Any]]) -> str:
    curves = pictures.curves_of(entries)
    if not curves:
        return ""
    if not pictures.can_plot():
        return "<p>The plot needs matplotlib: pip install 'dmq-ao[report]'.</p>"
    light, dark = (pictures.data_uri(pictures.error_plot(curves, "svg", dark), "svg+xml") for dark in (False, True))
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
    return _html_table(
        LAYER_COLUMNS.values(), ([_layer_cell(layer, key) for key in LAYER_COLUMNS] for layer in layers), ""
    )


def _layer_cell(layer: Mapping[str, Any], key: str) -> str:
    value = layer.get(key)
    if value is None or value == "":
        return DASH
    if key == "sqnr_db":
        return number(value, ".1f")
    return number(value, "g") if isinstance(value, float) else str(value)


def _float_layers(entries: Iterable[Mapping[str, Any]]) -> str:
    """Layers by reason; variants that keep the same layers share a table."""
    variants: dict[str, list[str]] = {}
    for entry in entries:
        if entry.get("kept_float"):
            variants.setdefault(_float_table(entry["kept_float"]), []).append(str(entry["name"]))
    return "".join(f"<h3>{escape(', '.join(names))}</h3>{table}" for table, names in variants.items())


def _float_table(layers: Iterable[Mapping[str, Any]]) -> str:
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        reasons.setdefault(str(layer.get("why") or DASH), []).append(str(layer["name"]))
    rows = [(why, str(len(names)), ", ".join(names)) for why, names in reasons.items()]
    return _html_table(("why", "count", "layers"), rows, "kept")


def _facts_list(report: Mapping[str, Any]) -> str:
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
