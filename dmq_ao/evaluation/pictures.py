"""The pictures of a report: a grid of samples, and the error by timestep as a plot."""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
from torch import Tensor

from dmq_ao.evaluation.table import FLOAT_ROW, number

CELL = 192  # pixels: small images are enlarged by whole factors up to about this
LIGHT = {"ink": "#1d2126", "soft": "#666d78", "line": "#e2e5ea", "page": "#ffffff"}
DARK = {"ink": "#e9ebee", "soft": "#9aa3af", "line": "#333a44", "page": "#191c21"}
LIGHT_LINES = ("#2a78d6", "#d9730d", "#0f9f76", "#8a4fd3", "#d6336c", "#7a6a00")
DARK_LINES = ("#6cabf7", "#f2a35e", "#4fd1a5", "#b894f4", "#f783ac", "#d3c04a")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Curve = tuple[str, list[float], list[float]]


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

    pixels = pixel_rows(rows)
    if not pixels:
        raise ValueError("rows: expected at least one row of images, got none")
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
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(tile, (gutter + column * (width + gap), top))
    buffer = BytesIO()
    grid.save(buffer, "PNG")
    return buffer.getvalue()


def in_order(entries: Iterable[Mapping[str, Any]], images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows [N, C, H, W] in the order of the table.

    Raises:
        ValueError: for a row that the table does not have, or none of the float model.
    """
    names = [entry["name"] for entry in entries]
    unknown = sorted(images.keys() - set(names))
    if unknown:
        raise ValueError(f"images: expected rows named like the variants, {names}, got {unknown} besides")
    if FLOAT_ROW not in images:
        raise ValueError(f"images: expected a row named {FLOAT_ROW!r} to compare with, got {sorted(images)}")
    return {name: images[name] for name in names if name in images}


def captions_of(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What stands under the name of a row of pictures: its PSNR."""
    captions = {entry["name"]: number(entry.get("psnr_db"), ".1f", " dB") for entry in entries}
    return {**captions, FLOAT_ROW: "reference"}


def pixel_rows(rows: Mapping[str, Tensor]) -> dict[str, Pixels]:
    """Each row ``[N, C, H, W]`` in 0..1 as ``[N, H, W, 3]`` bytes.

    Raises:
        ValueError: for shapes that are none of images or differ, or values outside 0..1.
        TypeError: for images that are not floating point.
    """
    shapes = {name: list(images.shape) for name, images in rows.items()}
    first = next(iter(shapes.values()), [])
    for name, shape in shapes.items():
        if len(shape) != 4 or 0 in shape or shape[1] not in (1, 3):
            raise ValueError(f"images {name!r}: expected [N, C, H, W] with C 1 or 3, got {shape}")
        if shape != first:
            raise ValueError(f"images {name!r}: expected the shape of the first row, {first}, got {shape}")
    return {name: _as_pixels(name, images) for name, images in rows.items()}


def _as_pixels(name: str, images: Tensor) -> Pixels:
    if not images.is_floating_point():
        raise TypeError(f"images {name!r}: expected floating point in 0..1, got {images.dtype}")
    values = images.detach().cpu().float()
    low, high = values.min().item(), values.max().item()
    if not (low >= -0.01 and high <= 1.01):  # a little overshoot is rounding; -1..1 is another convention
        raise ValueError(f"images {name!r}: expected values in 0..1, got {low:.3g}..{high:.3g}")
    bytes_ = values.clamp(0, 1).mul(255).round().byte()
    return bytes_.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def png(image: Pixels) -> bytes:
    """One picture [H, W, 3] as the bytes of a PNG file."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """A picture as an address that holds it; ``kind`` is ``png`` or ``svg+xml``."""
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def error_plot(curves: Sequence[Curve], kind: str, dark: bool) -> bytes:
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


def curves_of(entries: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """The points that a logarithmic axis can show, by rising timestep."""
    curves = []
    for entry in entries:
        by_timestep = entry.get("errors_by_timestep") or {"timesteps": (), "errors": ()}
        pairs = zip(map(float, by_timestep["timesteps"]), map(float, by_timestep["errors"]), strict=True)
        points = sorted((timestep, error) for timestep, error in pairs if error > 0 and math.isfinite(error))
        if points:
            curves.append((entry["name"], [point[0] for point in points], [point[1] for point in points]))
    return curves
