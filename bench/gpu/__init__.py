"""The parts of `bench/gpu/run.py`: build, laws, sanitize, ops, decode, prefill, graphs.

Each part is a class with `items()`, what it would do in order of importance, and `run(item)`, which
returns one row of figures. It works in a process of its own (worker.py): a kernel that goes wrong
takes the whole CUDA context with it, and then only that item is lost.
"""
