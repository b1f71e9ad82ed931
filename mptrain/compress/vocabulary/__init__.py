"""Tokens that nobody uses, taken out of a model and its tokenizer."""
