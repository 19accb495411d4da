"""Runs a command several times beside busy loops: what passes there does not depend on pace.

    python tools/loaded.py [--times 3] [--loops 4] COMMAND…

Ends with the first run that fails. The loops end with this program, however it ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

# A loop ends when its pipe does: also when the program that holds the other end was killed.
_LOOP = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
while True:
    pass
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--cores", type=int, default=2, help="share so many")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):  # inherited by the loops and the command
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    read, write = os.pipe()  # the far end closes with this process
    loops = [
        subprocess.Popen([sys.executable, "-c", _LOOP], stdin=read) for _ in range(options.loops)
    ]
    try:
        for number in range(options.times):
            print(f"run {number + 1} of {options.times}, beside {options.loops} loops", flush=True)
            status = subprocess.run(options.command, check=False).returncode
            if status:
                return status
        return 0
    finally:
        os.close(write)
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    sys.exit(main())
