"""What all formats need of a torch model: traceable modules, decoders with a cache, stored integers."""
