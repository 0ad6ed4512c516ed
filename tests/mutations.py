"""Mutations of files: bytes, fields of JSON, and tensors, drawn from a seed."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import struct
import threading
from collections.abc import Iterator
from typing import Any

SECONDS = 5  # no single file may cost as much

# Written into JSON as they stand.
_NUMBERS = [
    "0",
    "-0.0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "7",
    "1e400",
    "-1e400",
    "1e308",
    "1e39",
    "NaN",
    "Infinity",
    "-Infinity",
    "4294967296",
    "18446744073709551616",
    "1606938044258990275541962092341162602522202993782792835301376",
    "1e-320",
    "1000000",
    "100000000000000000000000000000",
]
_NUMBERS.append("1" + 400 * "0")
_NUMBERS.append("1" + 5000 * "0")
_WORDS = [
    "null",
    "true",
    "false",
    '""',
    '"x"',
    '"0"',
    '"0.0.factor0"',
    '"F64"',
    '"BF16"',
    '"I64"',
    '"blocks"',
    '"blocks.0.q"',
    '"q"',
    '"full"',
    '"train"',
    '"stored"',
    '"balanced"',
    '"aligned"',
    '"("',
    '".*"',
    '"(a+)+$"',
    '"((.*)*)*!"',
    '"(.*)(.*)(.*)(.*)(.*)(.*)!"',
    '"((a|a)*)*$"',
    '"(?=.*)(.+)+!"',
    '"\\\\d+"',
    '"Identity"',
    '"Fastfood"',
    '"LORA"',
    '"LOKR"',
    '"all"',
    '"lora_only"',
    '"all-linear"',
    '"\\u0000"',
    '"\\ud800"',
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "[0]",
    "[1,2]",
    "[1,2,3,4]",
    '{"":0}',
    '{"q":null}',
    '{"q":{}}',
    '{"q":{"rank":1}}',
    '{"q":{"scale":1e30}}',
    '{"q":{"overrides":{}}}',
    '[["q",[4,4]]]',
    '{"name":"Identity"}',
    '{"name":"Fastfood"}',
    '{"name":"Shuffle","seed":3}',
]
_WORDS.append('"' + 3000 * "a" + '"')
_WORDS.append(200 * "[" + 200 * "]")
_WORDS.append(2000 * '{"a":' + "0" + 2000 * "}")
VALUES = [*_NUMBERS, *_WORDS]


class Object(list):
    """A JSON object as a list of [key, value], which may have a key twice."""


class Raw(str):
    """JSON text that is written as it stands."""


def parsed(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Object(map(list, pairs)))


def written(tree: Any) -> str:
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{written(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(written, tree)) + "]"
    return json.dumps(tree)


def _places(tree: Any) -> Iterator[tuple[Any, int]]:
    """Yield every place of a tree: a list, and an index of it."""
    for index, item in enumerate(tree) if isinstance(tree, list) else ():
        yield tree, index
        yield from _places(item[1] if isinstance(tree, Object) else item)


def mutate_json(text: str, draw: random.Random) -> str:
    """Change some places of a JSON text: values, keys, duplicates, exchanges."""
    tree = parsed(text)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        # Of a long list no place is as likely as one of the header itself.
        top = [(tree, index) for index in range(len(tree))]
        holder, index = draw.choice(places if draw.random() < 0.7 else top or places)
        item = holder[index]
        kind = draw.randrange(7)
        if kind < 3:
            value = Raw(draw.choice(VALUES))
            if isinstance(holder, Object) and isinstance(item, list):
                holder[index] = [item[0], value]
            else:
                holder[index] = value
        elif kind == 3:
            del holder[index]
        elif kind == 4:
            copy = parsed(written(item)) if not isinstance(holder, Object) else [*item]
            if isinstance(holder, Object) and draw.random() < 0.5:
                copy[1] = Raw(draw.choice(VALUES))
            holder.insert(draw.randrange(len(holder) + 1), copy)
        elif kind == 5 and isinstance(holder, Object):
            other = draw.choice(places)
            key = draw.choice(
                ["", "x", "q", "scale", "rank", "also", "r", "(a+)+$", "0.0.core", "a" * 3000]
            )
            taken = other[0][other[1]]
            if isinstance(other[0], Object) and draw.random() < 0.5:
                key = taken[0]
            holder[index] = [key, item[1]]
        else:
            other, place = draw.choice(places)
            one, two = holder[index], other[place]
            # As text, or one inside the other would make a circle.
            values = [
                Raw(written(e[1] if isinstance(h, Object) else e))
                for h, e in ((holder, one), (other, two))
            ]
            holder[index] = [one[0], values[1]] if isinstance(holder, Object) else values[1]
            other[place] = [two[0], values[0]] if isinstance(other, Object) else values[0]
    return written(tree)


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, delete, insert or repeat some bytes."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        if not found:
            break
        # The header is where most of the meaning is.
        end = len(found) if draw.random() < 0.3 else min(len(found), 2000)
        place = draw.randrange(end)
        kind = draw.randrange(5)
        if kind < 2:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del found[place : place + draw.choice((1, 2, 8))]
        elif kind == 3:
            found[place:place] = draw.randbytes(draw.choice((1, 2, 8)))
        else:
            found[place:place] = found[place : place + draw.choice((1, 8, 64))]
    return bytes(found)


def opened(content: bytes) -> tuple[Any, bytes]:
    """Return the header of a safetensors file as a tree, and the tensors' bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    return parsed(content[8 : 8 + size]), content[8 + size :]


def closed(header: str, data: bytes) -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def mutate_file(content: bytes, draw: random.Random) -> bytes:
    """Change a safetensors file: its bytes, its metadata, its tensors' entries or values."""
    kind = draw.random()
    if kind < 0.15:
        return mutate_bytes(content, draw)
    tree, data = opened(content)
    metadata = next((entry for entry in tree if entry[0] == "__metadata__"), None)
    own = next((e for e in metadata[1] if e[0] == "superlora"), None) if metadata else None
    if own is not None and kind < 0.75:
        own[1] = mutate_json(own[1], draw)
        return closed(written(tree), data)
    if kind < 0.85:
        return closed(mutate_json(written(tree), draw), data)
    return mutate_tensors(tree, data, draw)


_BAD = [
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\x00\x00\x80\xff",
    b"\xff\xff\x7f\x7f",
    b"\0\0\0\x80",
]


def mutate_tensors(tree: Any, data: bytes, draw: random.Random) -> bytes:
    """Change one tensor: its values, dtype or shape; drop it, or add another."""
    entries = [entry for entry in tree if entry[0] != "__metadata__"]
    if not entries:
        return closed(written(tree), data)
    entry = draw.choice(entries)
    own = dict(map(tuple, entry[1]))
    start, stop = own["data_offsets"]
    kind = draw.randrange(6)
    if kind < 2 and stop - start >= 4:
        place = start + 4 * draw.randrange((stop - start) // 4)
        data = data[:place] + draw.choice(_BAD) + data[place + 4 :]
    elif kind == 2:
        own["dtype"] = draw.choice(["F64", "F16", "BF16", "I32", "I8", "BOOL", "C64", "F8_E4M3"])
    elif kind == 3:
        own["shape"] = draw.choice([[*own["shape"], 1], own["shape"][::-1], own["shape"][1:], []])
    elif kind == 4:
        # A whole file of one tensor less.
        data = data[:start] + data[stop:]
        tree.remove(entry)
        for other in entries:
            bounds = dict(map(tuple, other[1]))["data_offsets"]
            if bounds[0] >= stop:
                bounds[:] = [each - (stop - start) for each in bounds]
        return closed(written(tree), data)
    else:
        name = draw.choice(
            ["extra", "model.extra", "model.head.weight", "9.0.core", entry[0] + ".x"]
        )
        offsets = [len(data), len(data) + 16]
        tree.append(
            [name, Object([["dtype", "F32"], ["shape", [2, 2]], ["data_offsets", offsets]])]
        )
        data += struct.pack("<4f", 1, 2, 3, draw.choice((4, float("nan"))))
        return closed(written(tree), data)
    entry[1] = Object([[key, value] for key, value in own.items()])
    return closed(written(tree), data)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise in the block once it takes that long, where the system can say it."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
