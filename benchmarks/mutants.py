"""Delta files and what can become of them: seed n is always the same bytes.

The files are put together by hand, from the format's description, so that they share no code with
what reads them. A few are good; the mutants are changed in their arrays, in what they declare, in
the header's text or in their bytes.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from spieldose_kernels.base_spec import BaseSpec

BASE = BaseSpec(
    "base",
    "f" * 64,
    {
        **{"q": (40, 60), "down": (24, 70_000), "tiny": (5, 7), "o": (16, 33)},
        **{"large": (512, 4096), "huge": (4096, 4096)},
    },
)
Draw = random.Random
Array = np.ndarray


@dataclass(slots=True)
class Draft:
    """Hold a delta file in the making: nothing in it need be true."""

    metadata: dict[str, str]
    modules: dict[str, list[int]]  # what it declares: [R, C, Z]
    arrays: dict[str, Array]  # by tensor name; uint16 stands for bfloat16 where values are
    dtypes: dict[str, str]  # by tensor name, in the format's words

    def copied(self) -> "Draft":
        """Return another that may be changed."""
        arrays = {name: array.copy() for name, array in self.arrays.items()}
        modules = {name: list(shape) for name, shape in self.modules.items()}
        return Draft(dict(self.metadata), modules, arrays, dict(self.dtypes))


def draft(
    densities: dict[str, float], values: str, *, seed: int, metadata: dict[str, str] | None = None
) -> Draft:
    """Make a good file's draft with so many of each module's weights."""
    numbers = np.random.default_rng(seed)
    made = Draft({}, {}, {}, {})
    for module, density in densities.items():
        height, width = BASE.shapes[module]
        count = int(height * width * density)
        flat = np.sort(numbers.choice(height * width, count, replace=False, shuffle=False))
        rows, columns = flat // width, flat % width
        starts = np.searchsorted(rows, np.arange(height + 1)).astype(np.int32)
        drawn = numbers.standard_normal(count).astype(np.float32)
        kinds = {"F32": drawn, "F16": drawn.astype(np.float16)}
        kinds["BF16"] = (drawn.view(np.uint32) >> 16).astype(np.uint16)
        short = width <= 1 << 16
        made.arrays |= {
            f"{module}.row_starts": starts,
            f"{module}.columns": columns.astype(np.uint16 if short else np.int32),
            f"{module}.values": kinds[values],
        }
        made.dtypes |= {
            f"{module}.row_starts": "I32",
            f"{module}.columns": "U16" if short else "I32",
            f"{module}.values": values,
        }
        made.modules[module] = [height, width, count]
    made.metadata = {
        "format": "spieldose.delta",
        "format_version": "1",
        "base_model": "some/base",
        "base_fingerprint": BASE.fingerprint,
        "method": "spiel-ag",
        "density": "0.01",
        "description": "a disc, Glück",
        "settings": '{"steps": "10"}',
    } | (metadata or {})
    return made


@cache
def drafts() -> tuple[Draft, ...]:
    """Return what all mutants come from; the one with float16 values is good no more."""
    odd = {
        "description": 'a "quote", \\, \n, \x7f, 𝄞, \u2028 and \u202eback',
        "settings": json.dumps({"": "", "ключ": "[" * 50, "n": 1e300, "deep": [[{"a": None}]]}),
    }
    several = {"q": 0.05, "tiny": 0.3, "o": 0.1}
    return (
        draft(several, "F32", seed=1),
        draft(several, "BF16", seed=2, metadata=odd),
        draft(several, "F16", seed=3),
        draft({"tiny": 0.0}, "F32", seed=4),
        draft({"q": 0.0, "tiny": 0.1}, "BF16", seed=5),
        draft({"o": 1.0, "tiny": 1.0}, "F32", seed=6),
        draft({"down": 0.001}, "F32", seed=7, metadata=odd),
        draft({"down": 0.0005, "q": 0.2}, "BF16", seed=8),
    )


@cache
def large_drafts() -> tuple[Draft, ...]:
    """Return some that are read in several pieces."""
    return (
        draft({"large": 0.05, "q": 0.05}, "F32", seed=9),
        draft({"large": 0.5}, "BF16", seed=10),
        draft({"large": 0.2, "down": 0.05}, "F32", seed=11),
    )


LARGE = 0.02  # of all mutants


def mutant(seed: int) -> bytes:
    """Return the file of a seed; one in fifty is as it was."""
    draw = Draw(seed)
    made = draw.choice(large_drafts() if draw.random() < LARGE else drafts()).copied()
    if draw.random() < 0.02:
        return encoded(made, entries_of(made))
    where = draw.sample(("arrays", "declared", "header", "bytes"), draw.choice((1, 1, 1, 2)))
    if "arrays" in where:
        draw.choice(ARRAYS)(made, draw)
    if "declared" in where:
        draw.choice(DECLARED)(made, draw)
    entries = entries_of(made)
    if "header" in where:
        draw.choice(HEADER)(entries, draw)
    payload = encoded(made, entries)
    if "bytes" in where:
        payload = draw.choice(BYTES)(payload, draw)
    return payload


# --- from a draft to bytes -----------------------------------------------------------------------

Entries = list[tuple[str, str]]  # JSON's text of every key and its value


def entries_of(made: Draft) -> Entries:
    """Return the header of a draft."""
    metadata = {"modules": json.dumps(made.modules)} | made.metadata
    entries = [('"__metadata__"', json.dumps(metadata, ensure_ascii=False))]
    end = 0
    for name, array in sorted(made.arrays.items(), key=lambda item: -item[1].itemsize):
        begin, end = end, end + array.nbytes
        entry = {"dtype": made.dtypes[name], "shape": array.shape, "data_offsets": [begin, end]}
        entries.append((json.dumps(name), json.dumps(entry)))
    return entries


def encoded(made: Draft, entries: Entries) -> bytes:
    """Return a header and the draft's arrays as a file."""
    arrays = sorted(made.arrays.values(), key=lambda array: -array.itemsize)
    text = "{" + ",".join(f"{key}:{value}" for key, value in entries) + "}"
    return with_header(text.encode(errors="surrogatepass"), b"".join(a.tobytes() for a in arrays))


def with_header(header: bytes, data: bytes) -> bytes:
    """Return a file of a header and its data."""
    return len(header).to_bytes(8, "little") + header + data


# --- the arrays ----------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 5, 7, 24, 40, 60, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64)
FLOATS = (np.nan, np.inf, -np.inf, 1e-45, 3.4028235e38, -3.39e38, 0.0, -0.0, 65_504.0)
HALVES = (0x7FC0, 0x7F80, 0xFF80, 0x0001, 0x7F7F, 0x8000, 0x7F81)


def some(made: Draft, draw: Draw, part: str) -> str:
    """Return the name of one of the draft's arrays of a kind, of any if there is none."""
    names = [name for name in made.arrays if name.endswith(part)] or list(made.arrays)
    return draw.choice(names)


def change_entries(made: Draft, draw: Draw) -> None:
    """Put strange numbers into an array of indices."""
    array = made.arrays[some(made, draw, draw.choice((".columns", ".row_starts")))]
    for _ in range(draw.randint(1, 3) if array.size else 0):
        number = draw.choice((*NUMBERS, -1, -2, -(2**31), int(array[draw.randrange(array.size)])))
        bits = number % (1 << 8 * array.itemsize)
        array.view(f"u{array.itemsize}")[draw.randrange(array.size)] = bits


def swap_entries(made: Draft, draw: Draw) -> None:
    """Exchange two neighbours, or give one the other's number."""
    array = made.arrays[some(made, draw, draw.choice((".columns", ".row_starts")))]
    if array.size > 1:
        at = draw.randrange(array.size - 1)
        array[at] = array[at + 1]
        if draw.random() < 0.5:
            array[at], array[at + 1] = array[at + 1] + 1, array[at]


def change_values(made: Draft, draw: Draw) -> None:
    """Put values at the edge of what is a number, or behind it."""
    array = made.arrays[some(made, draw, ".values")]
    for _ in range(draw.randint(1, 3) if array.size else 0):
        at = draw.randrange(array.size)
        with np.errstate(over="ignore"):
            array[at] = draw.choice(HALVES) if array.dtype == np.uint16 else draw.choice(FLOATS)


def retype(made: Draft, draw: Draw) -> None:
    """Store an array as another type, and say so, or not."""
    name = draw.choice(list(made.arrays))
    dtype, kind = draw.choice(
        (("I64", "i8"), ("I32", "i4"), ("I16", "i2"), ("F16", "f2"), ("F64", "f8"), ("U8", "u1"))
    )
    with np.errstate(all="ignore"):
        made.arrays[name] = made.arrays[name].astype(kind)
    if draw.random() < 0.8:
        made.dtypes[name] = dtype


def resize(made: Draft, draw: Draw) -> None:
    """Make an array longer or shorter, or two-dimensional; perhaps values and columns alike."""
    module = draw.choice(list(made.modules))
    count = draw.choice((-2, -1, 1, 2))
    for part in draw.choice((("values",), ("columns",), ("row_starts",), ("values", "columns"))):
        name = f"{module}.{part}"
        if name in made.arrays:
            array = made.arrays[name]
            made.arrays[name] = np.resize(array, max(0, array.size + count))
    if draw.random() < 0.3:
        made.modules[module][2] += count
    if draw.random() < 0.1:
        name = draw.choice(list(made.arrays))
        made.arrays[name] = made.arrays[name][:, None]


def drop_or_rename(made: Draft, draw: Draw) -> None:
    """Leave an array out, give it another name, or add one."""
    name = draw.choice(list(made.arrays))
    other = draw.choice(("x", "q.bias", "tiny.values.values", "", "\n", name + ".", "__metadata__"))
    array, dtype = made.arrays[name], made.dtypes[name]
    if draw.random() < 0.7:
        del made.arrays[name], made.dtypes[name]
    if draw.random() < 0.6:
        made.arrays[other], made.dtypes[other] = array, dtype


def exchange(made: Draft, draw: Draw) -> None:
    """Give two arrays each other's place."""
    first, second = draw.choice(list(made.arrays)), draw.choice(list(made.arrays))
    arrays = made.arrays
    arrays[first], arrays[second] = arrays[second], arrays[first]


ARRAYS: tuple[Callable[[Draft, Draw], None], ...] = (
    *(change_entries, change_entries, swap_entries, swap_entries),
    *(change_values, change_values, retype, resize, drop_or_rename, exchange),
)

# --- what is declared ----------------------------------------------------------------------------


def change_shape(made: Draft, draw: Draw) -> None:
    """Declare other numbers for a module."""
    shape = made.modules[draw.choice(list(made.modules))]
    at = draw.randrange(3)
    shape[at] = draw.choice((*NUMBERS, -1, shape[at] + 1, shape[at] - 1, 10**400))


def rename_module(made: Draft, draw: Draw) -> None:
    """Call a module something else, in all places or in one."""
    old = draw.choice(list(made.modules))
    new = draw.choice(("Q", "two\nlines", "tiny", "o", "a" * 5000, "\x00", "𝄞", "\ud800", "x.y.z"))
    made.modules = {new if m == old else m: shape for m, shape in made.modules.items()}
    if draw.random() < 0.7:
        for names in (made.arrays, made.dtypes):
            for name in [name for name in names if name.startswith(f"{old}.")]:
                names[new + name.removeprefix(old)] = names.pop(name)  # type: ignore[attr-defined]


def change_text(made: Draft, draw: Draw) -> None:
    """Put another text into the metadata, or leave it out."""
    key = draw.choice((*made.metadata, "modules", "another"))
    if draw.random() < 0.15:
        made.metadata.pop(key, None)
    else:
        made.metadata[key] = draw.choice(TEXTS)(draw)


TEXTS: tuple[Callable[[Draw], str], ...] = (
    lambda draw: draw.choice(("", "0", "1", "2", "nan", "inf", "-1", "1e999", "0.5", "1_0", " 1 ")),
    lambda draw: draw.choice(("null", "true", "[]", "{}", "{", '"x"', "NaN", "Infinity", "[[]]")),
    lambda draw: draw.choice(("\n", "\r\nlog line", "\u2028", "\ud800", "\x00", "\x1b[2J", "𝄞")),
    lambda draw: "x" * draw.choice((1000, 20_000, 300_000)),
    lambda draw: "𝄞" + "x" * draw.choice((1000, 20_000)),
    lambda draw: draw.choice(("[", '{"a":', "[[],")) * draw.choice((500, 5000, 50_000)),
    lambda draw: "[" + "9" * draw.choice((100, 5000)) + "]",
    lambda draw: json.dumps({"q": [draw.choice(NUMBERS), draw.choice(NUMBERS), 1]}),
    lambda draw: '{"tiny": [5, 7, 0], "tiny": [5, 7, 1]}',
    lambda draw: json.dumps({"tiny": [5, 7.0, draw.choice((True, None, "1", 1.5, [1], {}))]}),
    lambda draw: '{"q": [NaN, 60, 1e999], "' + "k" * 3000 + '": -Infinity}',
    lambda draw: json.dumps({f"k{i}": i for i in range(draw.choice((10, 3000)))}),
    lambda draw: '{"a": "\\ud83d"}',
)
DECLARED: tuple[Callable[[Draft, Draw], None], ...] = (
    *(change_shape, rename_module, change_text, change_text),
)

# --- the header's text ---------------------------------------------------------------------------

STRANGE = (
    *("0", "-1", "-0", "5", "1.5", "1e3", "1e999", "NaN", "Infinity", "-Infinity", "9" * 30, "01"),
    *("9" * 5000, "null", "true", "[]", "{}", "[0]", "[0,0]", "[-4,0]", "[18446744073709551615,0]"),
    *('""', '"x"', '"F16"', '"BF16"', '"F32"', '"I32"', '"U16"', '"\\ud800"', '"\n"', '"\\u0000"'),
    *("[" * 2000, '{"a":' * 2000, "[" * 900 + "]" * 900, "[" + "[]," * 60_000 + "[]]", "'x'", ""),
    *("[" + "0," * 100_000 + "0]", "[1152921504606846976, 16]", "[4294967296, 4294967296]"),
)


def change_field(entries: Entries, draw: Draw) -> None:
    """Say something else of an array in one of its three fields, or of one too many."""
    at = draw.randrange(len(entries))
    key, text = entries[at]
    entry = json.loads(text)
    field = draw.choice(("dtype", "shape", "data_offsets", "extra"))
    old = json.dumps(entry.get(field))
    new = draw.choice(STRANGE)
    if field == "data_offsets" and draw.random() < 0.6 and isinstance(entry.get(field), list):
        begin, end = entry[field]
        shift = draw.choice((1, 2, 4, -4, 16, 2**31, 2**63))
        new = draw.choice((f"[{end},{begin}]", f"[{begin + shift},{end + shift}]", f"[0,{end}]"))
    fields = {name: json.dumps(value, ensure_ascii=False) for name, value in entry.items()}
    fields[field] = new if draw.random() < 0.9 else old
    if draw.random() < 0.1:
        fields.pop(field)
    entries[at] = (key, "{" + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}")


def change_value(entries: Entries, draw: Draw) -> None:
    """Put anything in the place of an entry's value or of its name."""
    at = draw.randrange(len(entries))
    key, value = entries[at]
    new = draw.choice(STRANGE)
    entries[at] = draw.choice(((key, new), (new, value)))


def repeat(entries: Entries, draw: Draw) -> None:
    """Name an array, or the metadata, twice: the same again, or another's place."""
    key, value = draw.choice(entries)
    entries.insert(
        draw.randrange(len(entries) + 1), (key, draw.choice((value, draw.choice(entries)[1])))
    )


def shuffle(entries: Entries, draw: Draw) -> None:
    """List the arrays in another order: no harm."""
    draw.shuffle(entries)


def space(entries: Entries, draw: Draw) -> None:
    """Write blanks where JSON lets them be: no harm."""
    blanks = draw.choice((" ", "\n\t", " " * 100))
    entries[:] = [(blanks + key + blanks, blanks + value + blanks) for key, value in entries]


def leave_out(entries: Entries, draw: Draw) -> None:
    """Leave an entry out."""
    entries.pop(draw.randrange(len(entries)))


def bloat(entries: Entries, draw: Draw) -> None:
    """Name very many arrays that are not there."""
    text = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries += [(f'"x{i}.values"', text) for i in range(draw.choice((100, 5000)))]


HEADER: tuple[Callable[[Entries, Draw], None], ...] = (
    *(change_field, change_field, change_field, change_value, repeat),
    *(shuffle, space, leave_out, bloat),
)

# --- the bytes -----------------------------------------------------------------------------------


def flip(payload: bytes, draw: Draw) -> bytes:
    """Flip bits anywhere."""
    return _flipped(payload, draw, len(payload))


def flip_header(payload: bytes, draw: Draw) -> bytes:
    """Flip bits in the header or its length."""
    return _flipped(payload, draw, min(len(payload), 8 + int.from_bytes(payload[:8], "little")))


def _flipped(payload: bytes, draw: Draw, end: int) -> bytes:
    changed = bytearray(payload)
    for _ in range(draw.choice((1, 1, 2, 8)) if end else 0):
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(payload: bytes, draw: Draw) -> bytes:
    """Lose the end, or a part in between."""
    start = draw.randrange(len(payload) + 1)
    return payload[:start] + draw.choice((b"", payload[start + draw.choice((1, 4, 1000)) :]))


def extend(payload: bytes, draw: Draw) -> bytes:
    """Have bytes too many, or a hole in the middle, now and then many."""
    count = draw.choice((1, 2, 8, 4096, 4096, 1 << 20))
    start = draw.choice((len(payload), draw.randrange(len(payload) + 1)))
    return payload[:start] + bytes(count) + payload[start:]


def claim(payload: bytes, draw: Draw) -> bytes:
    """Give the header another length."""
    length = int.from_bytes(payload[:8], "little")
    numbers = (
        0,
        1,
        2,
        length - 1,
        length + 1,
        length + 8,
        len(payload) - 8,
        10**8,
        2**63,
        2**64 - 1,
    )
    return (draw.choice(numbers) % 2**64).to_bytes(8, "little") + payload[8:]


def splice(payload: bytes, draw: Draw) -> bytes:
    """Go on as another file, which began the same or elsewhere."""
    made = draw.choice(drafts())
    other = encoded(made, entries_of(made))
    length, others = (8 + int.from_bytes(p[:8], "little") for p in (payload, other))
    at = draw.randrange(min(len(payload), len(other)))
    return draw.choice(
        (payload[:at] + other[at:], payload[:length] + other[others:], payload + other)
    )


BYTES: tuple[Callable[[bytes, Draw], bytes], ...] = (
    flip,
    flip,
    flip_header,
    cut,
    extend,
    claim,
    splice,
)
