"""What calibration learns, a file an algorithm."""
