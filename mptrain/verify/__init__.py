"""Is the export the model? Overflow search over any `Program`, parity, and which outputs count. Knows no format."""
