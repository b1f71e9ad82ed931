"""Structured pruning: masks that grow in training and are cut at the boundary. A file to each method."""
