"""A device that does everything as late as it may: what the stream was given happens when somebody
waits for it, or when work comes that the tests' device can only do at once."""

from __future__ import annotations

import random
from collections import deque
from contextlib import contextmanager, nullcontext
from unittest import mock

from elastic_infer.cache.cache import Cache
from elastic_infer.cache.pages import PAGE
from elastic_infer.device.device import Device
from elastic_infer.model.batch import Result
from elastic_infer.model.model import Model
from elastic_infer.scheduling.reader import Reader
from elastic_infer.scheduling.sampler import Sampler
from support.emulated import installed

# What works on the device's memory without being asked to wait in a line.
AT_ONCE = [
    (Model, "_run"),
    (Model, "_logits"),
    (Cache, "_zero"),
    (Cache, "_copy_slot"),
    (Cache, "export"),
    (Cache, "place"),
    (Sampler, "_ids"),
    (Sampler, "_on_host"),
    (Reader, "take"),
    (Result, "of"),
]


class Late(Device):
    """The emulated device with a line of work.

    seed: with one, the line also moves now and then of its own accord.
    log: "pass" for every pass of steps that was given, "wait" where the host waited for work that
    had not happened, in the order that it came to them.
    """

    def __init__(self, seed: int | None = None):
        super().__init__("emulated")
        self.log: list[str] = []
        self._line: deque = deque()
        self._given = self._done = 0
        self.prompt = False  # whether work is done as it comes
        self._random = None if seed is None else random.Random(seed)
        self._working = False

    def give(self, work) -> None:
        """Puts work at the end of the line."""
        self._line.append(work)
        self._given += 1
        if self.prompt:
            self.wait()
        elif self._random and self._random.random() < 0.3:
            self.run_until(self._done + self._random.randrange(len(self._line) + 1))

    def run_until(self, count: int) -> None:
        """Does the first `count` pieces of all the work ever given."""
        if self._working:
            return
        self._working = True
        try:
            while self._done < count:
                self._done += 1
                self._line.popleft()()
        finally:
            self._working = False

    def wait(self) -> None:
        self.run_until(self._given)

    def copy(self, target, source) -> None:
        self.give(lambda: target.copy_(source))

    def mark(self):
        return _Mark(self, self._given)


class _Mark:
    def __init__(self, device: Late, at: int):
        self._device, self._at = device, at

    def synchronize(self) -> None:
        if self._device._done < self._at:
            self._device.log.append("wait")
            self._device.run_until(self._at)


@contextmanager
def late_device(device: Late, module=None):
    """Inside, engines that are opened run on `device`: with the emulator's kernels if its module is
    given, else with those of the CPU, which are quicker and do not depend on the batch. Engines on
    a CPU that are used inside may generate, but not read for sequences driven by hand."""

    def at_once(method):
        def call(*args, **named):
            if device_of(args[0]) is not device:
                return method(*args, **named)
            device.wait()
            before, device.prompt = device.prompt, True
            try:
                return method(*args, **named)
            finally:
                device.prompt = before

        return call

    def device_of(thing):
        """Its device; what does not say belongs to this one."""
        return getattr(thing, "device", getattr(thing, "_device", device))

    replay, reserve = Model._replay, Cache.reserve

    def reserved(cache, sequence, count):
        last = sequence.length // PAGE
        mine, held = cache.device is device, last < len(sequence.pages)
        if mine and held and cache.pages.shared(sequence.pages[last]):
            device.wait()  # it is copied
        reserve(cache, sequence, count)

    def later(model, steps):
        if model.device is not device:
            return replay(model, steps)
        device.log.append("pass")
        device.give(lambda: replay(model, steps))

    kernels = installed(module) if module else nullcontext()
    with kernels, mock.patch("elastic_infer.engine.loading.choose_device", lambda _: device):
        patches = [
            mock.patch.object(Model, "_replay", later),
            mock.patch.object(Cache, "reserve", reserved),
        ]
        patches += [mock.patch.object(c, n, at_once(getattr(c, n))) for c, n in AT_ONCE]
        for patch in patches:
            patch.start()
        try:
            yield device
        finally:
            for patch in patches:
                patch.stop()
