"""The verbs: prepare, calibrate, convert, quantize, save, load, compile."""
