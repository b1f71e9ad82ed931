"""Numbers: latency side by side, and intervals."""
