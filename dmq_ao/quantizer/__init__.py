"""A recipe laid over a graph."""
