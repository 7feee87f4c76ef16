"""What quantization cost and what it saved: paired fidelity, latency and size, and the report that shows them."""

from dmq_ao.evaluation.cost import (
    Latency,
    StoredTensor,
    folder_bytes,
    latency,
    machine,
    mean_bits,
    peak_rss_bytes,
    speedup,
)
from dmq_ao.evaluation.fidelity import OneStep, image_fidelity, one_step_error, psnr, relative_error, sqnr
from dmq_ao.evaluation.report import image_grid, render_html, render_table, write_report

__all__ = [
    "Latency",
    "OneStep",
    "StoredTensor",
    "folder_bytes",
    "image_fidelity",
    "image_grid",
    "latency",
    "machine",
    "mean_bits",
    "one_step_error",
    "peak_rss_bytes",
    "psnr",
    "relative_error",
    "render_html",
    "render_table",
    "speedup",
    "sqnr",
    "write_report",
]
