"""Time and compare: ours and other tools."""
