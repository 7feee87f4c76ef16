"""How a quantized graph runs on a device: a folder a device.

``registry`` has the backends and picks one. Their names stand here, where nothing else is imported, so that a command
line can list them before torch is loaded.
"""

AUTO = "auto"
"""Takes the first backend that runs, of those that may be taken unasked."""
NAMES = ("onednn", "cuda", "reference")
"""Of all backends."""
