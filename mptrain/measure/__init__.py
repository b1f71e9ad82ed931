"""Numbers: latency side by side, the floor that any model must beat, intervals."""
