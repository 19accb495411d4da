"""Files with one thing wrong: values of JSON, structure, bytes, and headers of safetensors."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    16,
    17,
    255,
    10**9,
    2**31 - 1,
    2**31,
    2**34,
    2**63,
    -(2**63),
    10**299,
    10**400,
    -0.0,
    0.5,
    1e-45,
    1e39,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "x",
    "5",
    "-",
    "M" * 3000,
    "x" * 5000,
    "\ud800",
    "\0",
    "../x",
    "/etc/passwd",
    "re:([\\w.]+)+!",
    "re:(",
    "*",
    "{{",
    [],
    [[]],
    [None],
    [5],
    ["x"],
    ["M", "L"],
    {},
    {"": None},
    {"a": {"b": []}},
    {"__float__": "1"},
    {"content": 5},
    {"name": "x"},
)


DEEP = ("<deep 60>", "<deep 900>", "<deep 20000>")  # in the text, lists in lists


def text_of(value: Any, ascii_only: bool = True) -> bytes:
    """JSON of a value, as deep as it says."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    for mark in DEEP:
        levels = int(mark[6:-1])
        text = text.replace(f'"{mark}"', "[" * levels + "]" * levels)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found, stack = [], [value]
    while stack:
        item = stack.pop()
        keys = item.keys() if isinstance(item, dict) else range(len(item))
        for key in keys:
            found.append((item, key))
            if isinstance(item[key], (dict, list)):
                stack.append(item[key])
    return found


def mutate_json(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three things changed."""
    top = [json.loads(json.dumps(value))]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [(top, 0), *_places(top[0])] if isinstance(top[0], (dict, list)) else [(top, 0)]
        holder, key = rng.choice(places)
        old = holder[key]
        kind = rng.randrange(9)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "x", key + "x", "version", "\ud800"))] = holder.pop(key)
        elif kind == 2 and isinstance(old, (int, float)) and not isinstance(old, bool):
            half = old + 0.5 if abs(old) < 1e300 else 0.5
            scaled = (old + 1, old * 2, old * 16, -old, str(old), [old], half, 10**6 * old)
            holder[key] = rng.choice(scaled)
        elif kind == 3 and isinstance(old, str):
            holder[key] = rng.choice((old[:-1], old * 2, old + "\0", [old], old.upper(), old * 500))
        elif kind == 4 and isinstance(old, (dict, list)) and old:
            if isinstance(old, dict):
                holder[key] = rng.choice((list(old.values()), [old], {"a": old}, {}))
            else:
                numbered = {str(i): item for i, item in enumerate(old)}
                holder[key] = rng.choice((numbered, [old], {"a": old}, old * 3))
        elif kind == 5:
            holder[key] = rng.choice(DEEP)
        elif kind == 6:
            from_holder, from_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(from_holder[from_key]))
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))  # another mutation may lie in it
    return top[0]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some lost, changed, doubled or added."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(5)
        if kind == 0:
            del out[at : at + size]
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            out[at:at] = out[at : at + size]
        elif kind == 3:
            added = (b"[" * 5000, b"\xff", b"1" * 500, b'"', b"}", b"\\ud800", b"e999")
            out[at:at] = rng.choice(added)
        else:
            del out[at:]
    return bytes(out)


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """A JSON file with one thing wrong."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    changed = mutate_json(rng, json.loads(data))
    return text_of(changed, ascii_only=rng.random() < 0.8)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header, length or data has one thing wrong."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(6)
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind == 1:
        length = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**62, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:]
    if kind == 2:
        return data[: rng.randrange(len(data))]
    if kind == 3:
        entries = json.loads(header)
        name = rng.choice([n for n in entries if n != "__metadata__"])
        entry = entries[name]
        entry["shape"] = rng.choice(
            (
                entry["shape"][::-1],
                [*entry["shape"], 1],
                [math.prod(entry["shape"])],
                [2**62],
                [0],
                entry["shape"][1:],
                [2**31, 2**31, 4],
            )
        )
        if rng.random() < 0.3:
            kinds = ("F32", "BF16", "U8", "I64", "F8_E4M3", "F4", "C64", "BOOL")
            entry["dtype"] = rng.choice(kinds)
        header = json.dumps(entries).encode()
    else:
        changed = mutate_json(rng, json.loads(header))
        header = text_of(changed)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def mutate_metadata(rng: random.Random, metadata: dict[str, str]) -> dict[str, str]:
    """The metadata of a sequence file with one field wrong; every field is JSON or a name."""
    out = dict(metadata)
    key = rng.choice(list(out))
    try:
        inner = json.loads(out[key])
    except ValueError:
        inner = out[key]
    kind = rng.randrange(5)
    if kind == 0:
        del out[key]
    elif kind == 1:
        out[key] = mutate_bytes(rng, out[key].encode()).decode("utf-8", "replace")
    else:
        changed = mutate_json(rng, inner)
        bare = isinstance(changed, str) and kind == 2
        out[key] = changed if bare else text_of(changed).decode()
    return {k: v.encode("utf-8", "replace").decode() for k, v in out.items()}
