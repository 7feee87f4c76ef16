"""The results of commands as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmq_ao.benchmarks.peer_table import peer_notes, peer_rows
from dmq_ao.evaluation.table import machine_line, number, size_text

LEVELS = {"ok": "ok  ", "note": "note", "slow": "slow", "broken": "FAIL"}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns: the first row is the heading, numbers stand right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(cell.rjust(width) if end else cell.ljust(width) for cell, width, end in cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell.replace(".", "").replace("-", "").removesuffix("%").isdigit() or cell in ("", "–", "∞")


def layers_text(layers: Sequence[Mapping[str, Any]]) -> str:
    """One line a layer."""
    heading = ["layer", "kind", "role", "weight", "input", "SQNR dB", "kernel", "why"]
    return aligned([heading, *(_layer_row(layer) for layer in layers)])


def _layer_row(layer: Mapping[str, Any]) -> list[str]:
    widths = [str(layer["weight_bits"]), str(layer["activation_bits"])]
    kernel = "float, kept" if layer["status"] == "float" else str(layer.get("kernel", ""))
    roles = " ".join(layer.get("roles", ()))
    return [layer["name"], layer["kind"], roles, *widths, number(layer.get("sqnr_db"), ".1f"), kernel, layer["why"]]


def totals_text(report: Mapping[str, Any]) -> str:
    """Layers, true mean bits, size and kernels, a line each."""
    in_float, quantized = report["kept_layers"], report["quantized_layers"]
    lines = [
        f"layers     {quantized} of {quantized + in_float} quantized ({_scheme(report)}), {in_float} kept in float",
        f"mean bits  {report['mean_bits']:.2f} over all parameters",
    ]
    if report.get("file_bytes"):
        lines.append(f"size       {size_text(report['file_bytes'])}{_size_ratio(report)}")
    if "kernels" in report:
        kernels = ", ".join(f"{count} {name}" for name, count in report["kernels"].items())
        lines.append(f"kernels    {kernels or 'none'} (backend {report['backend']})")
    return "\n".join(lines)


def _size_ratio(report: Mapping[str, Any]) -> str:
    """How much smaller a file is than the float32 weights, or larger: small models are outweighed by their graph."""
    size, before = report["file_bytes"], report.get("float_bytes")
    if not before:
        return ""
    if size <= before:
        return f", {before / size:.2f}x smaller than float32"
    return f", {size / before:.2f}x larger than float32: the graph and the names take more than the weights save"


def _scheme(report: Mapping[str, Any]) -> str:
    recipe = report["recipe"]
    config = recipe["config"]
    votes = ", power-of-two" if config["power_of_two"] else ""
    return f"{recipe['name']} w{config['weight']['bits']}a{config['activation']['bits']}{votes}"


def quantize_text(report: Mapping[str, Any]) -> str:
    """The summary at the end of a run."""
    sqnr_db = {row["name"]: row["sqnr_db"] for row in report["layers"] if row["sqnr_db"] is not None}
    folder = report["folder"]
    lines = [totals_text(report)]
    if sqnr_db:
        worst = min(sqnr_db, key=sqnr_db.__getitem__)
        lines.append(f"noisiest   {worst}, {sqnr_db[worst]:.1f} dB on its own")
    lines.append(f"written    {folder}, with a report.json; every layer: dmq-ao inspect {folder}")
    return "\n".join(lines)


def forecast_text(report: Mapping[str, Any]) -> str:
    """What a dry run found."""
    heading = ["layer", "kind", "weight", "input", "why"]
    rows = [
        [row["name"], row["kind"], str(row["weight_bits"]), str(row["activation_bits"]), row["why"]]
        for row in report["layers"]
    ]
    return f"{aligned([heading, *rows])}\n\n{totals_text(report)}\n(predicted; nothing was calibrated or written)"


def inspect_text(report: Mapping[str, Any], everything: bool) -> str:
    """The totals, below the layers: all of them, or those that are kept, fall back, or are noisiest."""
    layers = report["layers"]
    rows = layers if everything else _remarkable(layers)
    rest = len(layers) - len(rows)
    more = f"\n({rest} layers more, quantized and less noisy: --all shows them)" if rest else ""
    return f"{layers_text(rows)}{more}\n\n{totals_text(report)}"


def verify_text(report: Mapping[str, Any]) -> str:
    """What was checked, in two or three lines."""
    checksums = (
        f"{report['tensors']} tensors by checksum" if report["tensors"] else "no manifest, one checksum for all"
    )
    graph = f"{report['operators']} operators" if report["operators"] else "no graph"
    return "\n".join(
        [
            f"{report['denoiser']}: whole, {report['bytes']:,} bytes",
            f"{checksums}; {report['layers']} layers, {graph}",
            f"signed by {report['signed_by']}" if report["signed_by"] else "not compared with a signature",
        ]
    )


def plan_text(plan: Mapping[str, Any]) -> str:
    """A bit plan, one line a layer, and its means."""
    rows = [["layer", "mean bits", "channels"]]
    for name, layer in plan["layers"].items():
        channels = ", ".join(f"{count} of {bits}" for bits, count in layer["channels_by_bits"].items())
        rows.append([name, number(layer["mean_bits"], ".2f"), f"{channels} bits"])
    lines = [aligned(rows), "", f"decided by {plan['scorer']}"]
    if plan["layers"]:
        lines.append(f"weights    {plan['mean_bits']:.3f} bits in the mean of the layers named here")
    if plan["inputs_by_bits"]:
        inputs = ", ".join(f"{count} of {bits}" for bits, count in plan["inputs_by_bits"].items())
        lines.append(f"inputs     {inputs} bits; {plan['mean_input_bits']:.3f} in the mean of their products")
    return "\n".join(lines)


def _remarkable(layers: Sequence[Mapping[str, Any]], noisiest: int = 10) -> list[Mapping[str, Any]]:
    quantized_layers = [layer for layer in layers if layer["status"] != "float" and layer["sqnr_db"] is not None]
    names = {layer["name"] for layer in sorted(quantized_layers, key=lambda layer: float(layer["sqnr_db"]))[:noisiest]}
    return [layer for layer in layers if layer["name"] in names or layer["why"]]


def benchmark_text(report: Mapping[str, Any]) -> str:
    """Medians with their spread, what they amount to, and the machine."""
    kernels = ", ".join(f"{count} {name}" for name, count in report["kernels"].items())
    table, *notes = _peers_lines(report) if "rows" in report else _float_lines(report)
    return "\n".join([table, "", *notes, f"kernels: {kernels or 'none'}", machine_line(report)])


def _float_lines(report: Mapping[str, Any]) -> list[str]:
    rows = [["", "median ms", "p10", "p90", "compile s"]]
    for name, times in report["latency_ms"].items():
        figures = [f"{times[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms")]
        rows.append([name, *figures, f"{report['compile_seconds'][name]:.1f}"])
    repeats = report["latency_ms"]["float"]["repeats"]
    return [
        aligned(rows),
        f"quantized ({_scheme(report)}) is {report['speedup']:.2f}x as fast as float32, both compiled"
        f" (mode {report['mode']}); batch {report['batch_size']}, {repeats} calls of each in turns",
    ]


def _peers_lines(report: Mapping[str, Any]) -> list[str]:
    repeats = next(row["repeats"] for row in report["rows"].values() if "repeats" in row)
    return [
        aligned(peer_rows(report)),
        f"{report['model']}, batch {report['batch_size']}, {repeats} calls of each in turns",
        *peer_notes(report),
    ]


def doctor_text(report: Mapping[str, Any]) -> str:
    """One line a finding, and the verdict."""
    findings = report["findings"]
    width = max(len(finding["subject"]) for finding in findings)
    lines = [f"{LEVELS[row['level']]}  {row['subject'].ljust(width)}  {row['text']}" for row in findings]
    speed = "with" if report["integer_kernels"] else "without"
    verdict = f"all in order, {speed} integer kernels" if report["healthy"] else "something is broken, see FAIL above"
    return "\n".join([*lines, "", verdict])
