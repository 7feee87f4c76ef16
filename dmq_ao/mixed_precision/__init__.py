"""Which bits where: what widths cost, and how they are shared out."""
