"""A reference interpreter of Core ML programs in torch: reads a package, runs it, emulates fp16, states its facts."""
