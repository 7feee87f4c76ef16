"""diffusers pipelines in and out."""
