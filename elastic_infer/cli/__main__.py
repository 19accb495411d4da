"""`python -m elastic_infer.cli` is `elastic-infer`."""

from . import main

main()
