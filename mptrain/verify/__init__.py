"""Is the export the model? Overflow search over any `Program`, parity, and which outputs count. Knows no format.

Called, it is `mptrain.api.verify.verify`.
"""

from mptrain.core.face import callable_package

callable_package(__name__, "mptrain.api.verify:verify")
