"""A folder to each format. `base` is the contract (Format, Runner, Facts), `formats` the table of them.

Called, it is `mptrain.api.export.export`.
"""

from mptrain.core.face import callable_package

callable_package(__name__, "mptrain.api.export:export")
