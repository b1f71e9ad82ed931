"""What makes a network smaller. `base` is the contract of a method, `methods` the table of them.

structure (blocks, costs, budgets, shrinking), prune, quantize, weights (integers and tables), calibrate (statistics
that several of them need), boundary (where a model changes shape between two phases).
"""
