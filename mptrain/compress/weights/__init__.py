"""Weights as integers or look-up tables: rounding, GPTQ, k-means, trained tables; `records` hold the result."""
