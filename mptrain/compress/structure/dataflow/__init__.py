"""Blocks of any model, found in what one forward pass computes: `finder.find` says how."""
