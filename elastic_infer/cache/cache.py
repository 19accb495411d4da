"""The cache: KV pages and state slots in two pools, and each sequence's place in them.

A KV page holds 64 tokens of every attention layer; a state slot holds one sequence's SSM state
(float32 or float16) and convolution history of every Mamba layer. Every sequence records which
width read which of its tokens, and whether as prefill or step.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..checkpoint.config import ModelConfig
from ..checkpoint.widths import Width
from ..device.device import CPU, Device
from ..errors import OutOfCapacity
from .dtypes import CacheDtypes
from .pages import PAGE, IdPool, pages_for
from .sequence import Saved, SavedState, Sequence, Snapshot, append_run


class Cache:
    """The two pools and what is in them.

    Args:
        config: sizes of the checkpoint.
        served: the served width.
        dtypes: of KV, SSM state and convolution history; a model's dtype stands for its defaults.
        num_pages: size of the pool of KV pages.
        num_slots: size of the pool of state slots.
        device: place of both pools.
    """

    def __init__(
        self,
        config: ModelConfig,
        served: Width,
        dtypes: CacheDtypes | torch.dtype,
        num_pages: int,
        num_slots: int,
        device: Device = CPU,
    ):
        zeros, dtypes = device.zeros, CacheDtypes.of(dtypes)
        self.device, self.dtypes = device, dtypes
        self.pages = IdPool(num_pages, "KV page")
        self.slots = IdPool(num_slots, "state slot")
        kv_shape = (num_pages, config.num_key_value_heads, PAGE, config.head_dim)
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self.ssm: list[torch.Tensor] = []
        self.conv: list[torch.Tensor] = []
        for layer, kind in enumerate(config.layers):
            if kind == "*":
                self.k.append(zeros(*kv_shape, dtype=dtypes.kv))
                self.v.append(zeros(*kv_shape, dtype=dtypes.kv))
            elif kind == "M":
                H, P = served.mamba_num_heads[layer], config.mamba_head_dim
                ssm_shape = (num_slots, H, P, config.ssm_state_size)
                self.ssm.append(zeros(*ssm_shape, dtype=dtypes.ssm))
                conv_shape = (num_slots, config.conv_dim(H), config.conv_kernel - 1)
                self.conv.append(zeros(*conv_shape, dtype=dtypes.conv))

    # -- opening and closing -----------------------------------------------------------------

    def open(self, track: bool = False) -> Sequence:
        """A new, empty sequence with a zeroed slot.

        Raises:
            OutOfCapacity: when no slot is free.
        """
        sequence = Sequence(slot=self.slots.take()[0], track=track)
        self._zero(sequence.slot)
        return sequence

    def close(self, sequence: Sequence) -> None:
        """Gives everything back; closing twice does nothing."""
        self.drop_snapshots(sequence)
        self._release(sequence)
        sequence.saved = None

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = []
        if sequence.slot >= 0:
            self.slots.release([sequence.slot])
            sequence.slot = -1

    def reset(self, sequence: Sequence) -> None:
        """Forgets all tokens but keeps the slot, zeroed; snapshots are dropped."""
        self.drop_snapshots(sequence)
        self.pages.release(sequence.pages)
        sequence.pages, sequence.tokens, sequence.runs = [], [], []
        self._zero(sequence.slot)

    def _zero(self, slot: int) -> None:
        for state in self.ssm + self.conv:
            state[slot].zero_()

    def _copy_slot(self, source: int, target: int) -> None:
        for state in self.ssm + self.conv:
            state[target].copy_(state[source])

    # -- growing -----------------------------------------------------------------------------

    def pages_needed(self, sequence: Sequence, count: int) -> int:
        """Free pages that appending `count` tokens takes: new ones, and a private copy of a last
        page that is shared."""
        # Asked for every row of every pass: no call is made.
        last, end = sequence.length // PAGE, -(-(sequence.length + count) // PAGE)
        copies = last < len(sequence.pages) and self.pages.shared(sequence.pages[last])
        return max(0, end - len(sequence.pages)) + int(copies and count > 0)

    def reserve(self, sequence: Sequence, count: int) -> None:
        """Makes room for `count` more tokens, copying a shared last page before it is written.

        Raises:
            OutOfCapacity: nothing is changed then.
        """
        fresh = self.pages.take(self.pages_needed(sequence, count)) if self.k else []
        if not self.k:
            return
        last = sequence.length // PAGE
        if last < len(sequence.pages) and self.pages.shared(sequence.pages[last]):
            copy, old = fresh.pop(), sequence.pages[last]
            for pages in self.k + self.v:
                pages[copy].copy_(pages[old])
            self.pages.release([old])
            sequence.pages[last] = copy
        sequence.pages.extend(fresh)

    def advance(self, sequence: Sequence, tokens: list[int], width: str, kind: str) -> None:
        """Records that `width` has read `tokens`."""
        sequence.tokens.extend(tokens)
        append_run(sequence.runs, width, kind, len(tokens), sequence.track)

    # -- snapshots, fork, rollback -----------------------------------------------------------

    def snapshot(self, sequence: Sequence) -> Snapshot:
        """A copy of the state and shared references to the pages, kept with the sequence.

        Raises:
            OutOfCapacity: when no slot is free.
        """
        slot = self.slots.take()[0]
        self._copy_slot(sequence.slot, slot)
        used = sequence.pages[: pages_for(sequence.length)] if self.k else []
        self.pages.share(used)
        snapshot = Snapshot(sequence.length, slot, list(used), list(sequence.runs))
        sequence.snapshots.append(snapshot)
        return snapshot

    def drop_snapshots(self, sequence: Sequence, keep: int = 0) -> None:
        """Gives back all snapshots but the newest `keep`."""
        while len(sequence.snapshots) > keep:
            old = sequence.snapshots.pop(0)
            self.pages.release(old.pages)
            self.slots.release([old.slot])

    def restore(self, sequence: Sequence, snapshot: Snapshot) -> None:
        """Puts the sequence back to the snapshot, which stays; later snapshots are dropped."""
        while sequence.snapshots and sequence.snapshots[-1] is not snapshot:
            later = sequence.snapshots.pop()
            self.pages.release(later.pages)
            self.slots.release([later.slot])
        self.pages.share(snapshot.pages)
        self.pages.release(sequence.pages)
        sequence.pages = list(snapshot.pages)
        sequence.tokens = sequence.tokens[: snapshot.length]
        sequence.runs = list(snapshot.runs)
        self._copy_slot(snapshot.slot, sequence.slot)

    def fork(self, sequence: Sequence) -> Sequence:
        """A twin that continues on its own: state copied, pages shared until written.

        Raises:
            OutOfCapacity: when no slot is free.
        """
        slot = self.slots.take()[0]
        self._copy_slot(sequence.slot, slot)
        self.pages.share(sequence.pages)
        return Sequence(
            tokens=list(sequence.tokens),
            runs=list(sequence.runs),
            pages=list(sequence.pages),
            slot=slot,
            track=sequence.track,
        )

    # -- host memory -------------------------------------------------------------------------

    def _export_slot(self, slot: int) -> SavedState:
        return SavedState([(_kept(s[slot]), _kept(c[slot])) for s, c in zip(self.ssm, self.conv)])

    def _import_slot(self, slot: int, saved: SavedState) -> None:
        for ssm, conv, (saved_ssm, saved_conv) in zip(self.ssm, self.conv, saved.layers):
            ssm[slot].copy_(saved_ssm)
            conv[slot].copy_(saved_conv)

    def export(self, sequence: Sequence, snapshots: bool = False) -> Saved:
        """Copies of the sequence's pages and state, and of its snapshots if asked."""
        kept = sequence.snapshots if snapshots else []
        used = sequence.pages[: pages_for(sequence.length)] if self.k else []
        unique = list(dict.fromkeys([*used, *(p for s in kept for p in s.pages)]))
        place = {page: i for i, page in enumerate(unique)}
        index = torch.tensor(unique, dtype=torch.long, device="cpu")
        return Saved(
            kv=[(k[index].cpu(), v[index].cpu()) for k, v in zip(self.k, self.v)],
            pages=[place[p] for p in used],
            state=self._export_slot(sequence.slot),
            snapshots=[
                (replace(s, slot=-1, pages=[place[p] for p in s.pages]), self._export_slot(s.slot))
                for s in kept
            ],
        )

    def preempt(self, sequence: Sequence) -> None:
        """Moves the sequence to host memory and frees its pages, slot and snapshots."""
        sequence.saved = self.export(sequence, snapshots=True)
        self.drop_snapshots(sequence)
        self._release(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Brings a preempted sequence back, bit-equal.

        Raises:
            OutOfCapacity: nothing is changed then.
        """
        if sequence.saved is not None:
            self.place(sequence, sequence.saved)
            sequence.saved = None

    def place(self, sequence: Sequence, saved: Saved) -> None:
        """Takes pages and slots for a sequence whose tokens are set, and fills them.

        Raises:
            OutOfCapacity: nothing is changed then.
        """
        if saved.page_count > self.pages.free or saved.slot_count > self.slots.free:
            raise OutOfCapacity(
                f"cache: a saved sequence must find {saved.page_count} KV pages and "
                f"{saved.slot_count} state slots, free {self.pages.free} and {self.slots.free}"
            )
        pages = self.pages.take(saved.page_count)
        index = torch.tensor(pages, dtype=torch.long, device="cpu")
        for k, v, (saved_k, saved_v) in zip(self.k, self.v, saved.kv):
            k[index], v[index] = self.device.to(saved_k), self.device.to(saved_v)
        sequence.pages = [pages[p] for p in saved.pages]
        sequence.slot = self.slots.take()[0]
        self._import_slot(sequence.slot, saved.state)
        holders = [sequence.pages]
        for snapshot, state in saved.snapshots:
            held = [pages[p] for p in snapshot.pages]
            slot = self.slots.take()[0]
            self._import_slot(slot, state)
            sequence.snapshots.append(replace(snapshot, slot=slot, pages=held))
            holders.append(held)
        for held in holders:  # one reference per holder, less the one that taking gave
            self.pages.share(held)
        self.pages.release(pages)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory."""
    return tensor.to("cpu", copy=True)
