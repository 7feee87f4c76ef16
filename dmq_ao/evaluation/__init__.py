"""What quantization cost and what it saved: paired fidelity, latency and size, and the report that shows them."""

from dmq_ao.evaluation.cost import (
    Latency,
    StoredTensor,
    clock_of,
    cuda_ms,
    folder_bytes,
    latency,
    machine,
    mean_bits,
    peak_rss_bytes,
    rss_bytes,
    speedup,
    wall_ms,
)
from dmq_ao.evaluation.fidelity import OneStep, image_fidelity, one_step_error, paired_error, paired_sqnr, psnr
from dmq_ao.evaluation.page import render_html
from dmq_ao.evaluation.pictures import image_grid
from dmq_ao.evaluation.report import write_report
from dmq_ao.evaluation.table import render_table

__all__ = [
    "Latency",
    "OneStep",
    "StoredTensor",
    "clock_of",
    "cuda_ms",
    "folder_bytes",
    "image_fidelity",
    "image_grid",
    "latency",
    "machine",
    "mean_bits",
    "one_step_error",
    "paired_error",
    "paired_sqnr",
    "peak_rss_bytes",
    "psnr",
    "render_html",
    "render_table",
    "rss_bytes",
    "speedup",
    "wall_ms",
    "write_report",
]
