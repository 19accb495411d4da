"""Pools and steps of several threads and processes, and at Python's end. A test that could end or
hang its process runs in one of its own."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import elastic_infer
from elastic_infer.ops import Pool, Step
from elastic_infer.ops.rms_norm import rms_norm

START = """
import gc, os, resource, signal, sys, threading
import torch
torch.set_num_threads(1)
from elastic_infer.ops import Pool, Step
from elastic_infer.ops.rms_norm import rms_norm

def norm(run, rows=512):
    out = torch.zeros(rows, 64)
    rms_norm(torch.ones(rows, 64), torch.ones(64), out, eps=0.0, run=run)
    return out
"""


def alone(script, *arguments):
    """(exit status, what was printed) of a process of its own; a hang is pytest's time limit."""
    root = Path(elastic_infer.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", START + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=os.environ | {"PYTHONPATH": f"{root}:{Path(__file__).resolve().parents[1]}"},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_forked_process_drops_a_pool_and_cannot_use_it():
    """Family: pools of any size, idle or used before the fork, that a child inherits: calls and
    replays are refused by name, dropping them and making others works."""
    script = """
for threads in (1, 2, 3, 4, 8) * 4:
    pool = Pool(threads)
    step = Step(pool)
    norm(step)
    norm(pool)
    if (pid := os.fork()) == 0:
        signal.alarm(60)
        for use in (lambda: norm(pool), step.run, step.profile):
            try:
                use()
                os._exit(1)
            except ValueError as error:
                if "process must be the one that made the pool" not in str(error):
                    os._exit(2)
        del use, step, pool
        gc.collect()
        os._exit(0 if (norm(Pool(2)) == 1).all() and (norm(None) == 1).all() else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (threads, status)
    norm(pool), step.run()
print("fine")
"""
    assert alone(script) == (0, "fine\n")


def test_threads_that_the_system_refuses_are_an_error():
    """A pool of more threads than there is address space for: those that started end, and the
    error says how many there were."""
    script = """
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), -1))
for _ in range(2):
    try:
        Pool(1024)
    except ValueError as error:
        assert "pool: threads must be as many as the system starts, got 1024" in str(error), error
    else:
        print("no error")
before = len(os.listdir("/proc/self/task"))
norm(Pool(2))
print("fine", before)
"""
    status, text = alone(script)
    assert status == 0 and text.startswith("fine"), text


@pytest.mark.parametrize("how", ["a pool", "one thread", "a step"])
def test_python_ends_while_threads_are_in_an_op(how):
    """Daemon threads in a call, in a replay or waiting for a pool, when the main thread ends."""
    script = """
pool = Pool(3)
step = Step(pool)
x, weight, out = torch.ones(4096, 64), torch.ones(64), torch.zeros(4096, 64)

def call(run):  # without torch's functions, which end such a process as they always did
    rms_norm(x, weight, out, eps=0.0, run=run)

call(step)
use = {"a pool": lambda: call(pool), "one thread": lambda: call(None), "a step": step.run}
begun = [threading.Event() for _ in range(3)]

def work(event):
    while True:
        use[sys.argv[1]]()
        event.set()

for event in begun:
    threading.Thread(target=work, args=(event,), daemon=True).start()
for event in begun:
    event.wait()
"""
    for _ in range(3):
        assert alone(script, how) == (0, "")


def test_a_step_is_not_recorded_into_while_it_runs():
    """Another thread replays the step over and over: to record either works or is refused by name,
    and the step holds every call that was accepted."""
    step, stop = Step(Pool(2)), threading.Event()
    x, weight = torch.ones(2048, 64), torch.ones(64)
    outs = [torch.zeros(2048, 64)]
    rms_norm(x, weight, outs[0], eps=0.0, run=step)

    def replay():
        while not stop.is_set():
            step.run()
            step.profile()

    threads = [threading.Thread(target=replay) for _ in range(2)]
    for thread in threads:
        thread.start()
    refused = 0
    while refused < 20:
        out = torch.zeros(2048, 64)
        try:
            rms_norm(x, weight, out, eps=0.0, run=step)
            outs.append(out)
        except ValueError as error:
            assert "rms_norm: run must be a Step that no thread runs" in str(error)
            refused += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert len(step) == len(outs) == len(step.names())
    step.run()
    assert all((out == 1).all() for out in outs)


def test_a_step_needs_a_pool():
    with pytest.raises(TypeError):
        Step(None)
