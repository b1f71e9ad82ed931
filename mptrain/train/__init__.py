"""Training a phase: `trainer` is the drop-in transformers.Trainer, `phase` the one that recipes use."""
