"""Which parts of a model can go (blocks, families), what they cost (costs, latency, budget), and taking them out."""
