"""Core ML packages: convert, half, weights, cached decoders, and the fence around coremltools (compat)."""
