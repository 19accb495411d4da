"""`python -m elastic_infer` is `elastic-infer`."""

from .cli import main

main()
