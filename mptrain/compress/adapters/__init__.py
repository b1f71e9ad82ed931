"""Low-rank adapters that train in place of weights."""
