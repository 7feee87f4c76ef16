"""A quantized denoiser on disk: ``folder`` writes and reads, the other files are what it holds, and how that is known.

A file is data: no text of it reaches generated source (``graph``), operators come from a list (``operators``), sizes
are known before anything is computed (``trial``), and every number is one that its meaning allows (``meaning``,
``agreement``).
"""
