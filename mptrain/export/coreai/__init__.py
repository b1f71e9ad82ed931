"""Core AI assets: convert, weights, cached decoders, runner, emulated fp16, facts."""
