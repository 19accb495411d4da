"""The ops: one module each, holding the public function, its plain-torch reference and its cases.

Every function writes into given outputs and takes ``run``: None executes at once on one thread, a
:class:`Pool` on its threads, and a :class:`Step` appends the call to a list that one native call
replays.

Values of tables (page, slot and row indices, widths, lengths, token ids): in host memory every one
is bounded, also in a replay, and one outside is a ValueError by name. In device memory the caller
checks them: kernels there read them as they are, and one outside reads or writes memory of others.
The engine fills such tables from its own records (``model/batch.py``).
"""

from .._C import Pool, Step
from ._spec import OpSpec, registry

__all__ = ["OpSpec", "Pool", "Step", "registry"]
