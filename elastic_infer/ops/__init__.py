"""The ops: one module each, holding the public function, its plain-torch reference and its cases.

Every function writes into given outputs and takes ``run``: None executes at once on one thread, a
:class:`Pool` on its threads, and a :class:`Step` appends the call to a list that one native call
replays.
"""

from .._C import Pool, Step
from ._spec import OpSpec, registry

__all__ = ["OpSpec", "Pool", "Step", "registry"]
