"""Which parts of a model can go (find: by dataflow, or written down), what they cost, and taking them out."""
