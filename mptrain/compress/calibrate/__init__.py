"""Statistics of calibration batches: losses, Fisher information, inputs of layers; shared among ranks."""
