"""What makes a network smaller. `base` is the contract of a method, `methods` the table of them.

structure (blocks, costs, budgets, shrinking), prune, quantize, weights (integers and tables), calibrate (statistics
that several of them need), boundary (where a model changes shape between two phases).

Called, it is `mptrain.api.compress.compress`.
"""

from mptrain.core.face import callable_package

callable_package(__name__, "mptrain.api.compress:compress")
