"""Damage to files as hypothesis makes it: bytes, JSON by its structure, and trees with tensors."""

import gzip
import io
import json
import lzma
import struct
import warnings

import torch
from hypothesis import strategies as st

# JSON as text that json.dumps does not write; the names stand for it in a tree until then
RAW = {
    "\0huge": "1e999",
    "\0minus huge": "-1e999",
    "\0nan": "NaN",
    "\0endless": "Infinity",
    "\0digits": "9" * 5000,
    "\0lists": "[" * 40_000 + "]" * 40_000,
    "\0objects": '{"a":' * 40_000 + "1" + "}" * 40_000,
    "\0open lists": "[" * 100_000,
    "\0half a pair": '"\\ud800"',
    "\0twice": '{"type": "ByteLevel", "type": 5, "text": "a", "text": []}',
    "\0nothing": "",
    "\0no escape": '"\\x"',
    "\0tiny": "1e-999",
    "\0minus zero": "-0.0",
}
ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 257, 1e-300, 0.5, -0.5, 1e300, 1.5, ""),
    *(2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**63, 2**64, -(2**31)),
    *(-(2**63), 10**30, 10**400, [], {}, [[]], [None], {"": None}, [0], ["a"], [["a", "b"]]),
    *("a", "text", "0", "-1", "\0", "\n", "\x1b[31m\x07", "\ud800", "é", "\U0001f600", " ", "../a"),
    *("/", "bytes", "gpt2", "tokenizer.json", "a" * 3000, "\u202e", "{}", "NaN", "1e5", "<u4"),
    *([1] * 300, {"a": {"b": {"c": 1}}}, {str(i): i for i in range(300)}, [["a"] * 3] * 3),
]
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
NUMBERS += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, 20240520, 20240801, 1024, 65536]
PIECES = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\xed\xa0\x80",
]
PIECES += [b"\xc3", b"\xef\xbb\xbf", b"NaN", b"null", b"-", b"9" * 400, b"\0" * 512, b"\x1f\x8b"]
PIECES += [b"PAR1", b"PK\x03\x04", b"ARROW1\0\0", b"\x1b]0;a\x07", b"\xff\xfe", b"|", b"\t", b'""']

places = st.integers(0, 2**20)
small = st.integers(0, 300)


# --- bytes


@st.composite
def bytes_hurt(draw, data):
    """A few of the ways in which a file goes wrong, one after another."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        edit = draw(st.sampled_from(EDITS))
        at = draw(st.one_of(st.integers(0, 64), st.integers(-64, -1), places))
        size = max(1, len(data))
        at = max(0, size + at) if at < 0 else at % size
        data = edit(draw, data, at)
    return bytes(data[: 2**20])


def flip(draw, data, at):
    data[at : at + 1] = bytes(b ^ (1 << draw(st.integers(0, 7))) for b in data[at : at + 1])
    return data


def put(draw, data, at):
    data[at : at + 1] = bytes([draw(st.integers(0, 255))])
    return data


def number(draw, data, at):
    """An integer of 1, 2, 4 or 8 bytes, where one of that size may stand."""
    width = draw(st.sampled_from([1, 2, 4, 8]))
    value = draw(st.sampled_from(NUMBERS)) % 256**width
    at -= at % width if draw(st.booleans()) else 0
    data[at : at + width] = value.to_bytes(width, draw(st.sampled_from(["little", "big"])))
    return data


def cut(draw, data, at):
    return data[:at]


def without(draw, data, at):
    del data[at : at + draw(small)]
    return data


def insert(draw, data, at):
    data[at:at] = draw(st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=8)))
    return data


def repeat(draw, data, at):
    data[at:at] = data[at : at + draw(small)] * draw(st.sampled_from([1, 2, 100]))
    return data


def splice(draw, data, at):
    other = draw(places) % max(1, len(data))
    piece = data[other : other + draw(small)]
    data[at : at + len(piece)] = piece
    return data


def blank(draw, data, at):
    size = draw(small)
    data[at : at + size] = bytes(len(data[at : at + size]))
    return data


EDITS = [flip, put, number, cut, without, insert, repeat, splice, blank]


# --- trees of dicts and lists


def children(tree):
    """Keys or numbers of what is inside."""
    return list(tree) if isinstance(tree, dict) else range(len(tree)) if is_list(tree) else []


def is_list(tree):
    return isinstance(tree, list)


def fresh(tree):
    """The same leaves in dicts and lists of their own; some tensors have no storage to copy."""
    if isinstance(tree, dict):
        return {key: fresh(value) for key, value in tree.items()}
    return [fresh(value) for value in tree] if is_list(tree) else tree


@st.composite
def tree_hurt(draw, tree, odd=ODD):
    """A tree, some of whose parts have been replaced, renamed, doubled, moved or taken away."""
    tree = {"": fresh(tree)}
    for _ in range(draw(st.integers(1, 3))):
        where, key = walk(draw, tree)
        kind = draw(
            st.sampled_from(["odd", "odd", "odd", "drop", "move", "rename", "number", "text"])
        )
        if kind == "drop" and where is not tree:
            del where[key]
        elif kind == "move":
            other, name = walk(draw, tree)
            where[key] = fresh(other[name])
        elif kind == "rename" and isinstance(where, dict) and where is not tree:
            name = draw(st.one_of(st.sampled_from(list(where)), st.text(max_size=8)))
            where[name] = where.pop(key)
        elif kind == "number":
            where[key] = draw(st.one_of(st.integers(), st.floats(), st.integers(-4, 400)))
        elif kind == "text":
            where[key] = draw(st.text(max_size=12))
        else:
            where[key] = fresh(draw(st.sampled_from(odd)))
    return tree[""]


def walk(draw, tree):
    """A part of a tree: what it is in, and its key there."""
    where, key = tree, ""
    for _ in range(8):
        inner = where[key]
        inside = children(inner)
        if not inside:
            break
        step = draw(st.integers(0, len(inside)))
        if step == len(inside):
            break
        where, key = inner, inside[step]
    return where, key


def dumped(tree, ascii=True):
    """JSON of a tree with the pieces of RAW in it, as bytes."""
    text = json.dumps(tree, ensure_ascii=ascii)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def json_hurt(draw, data):
    """A JSON file with damage to its contents, or to its bytes, or to both."""
    kind = draw(st.sampled_from(["tree", "tree", "tree", "bytes", "both"]))
    try:
        known = json.loads(data)
    except ValueError:  # one value after another
        return draw(lines_hurt(data))
    if kind != "bytes":
        tree = draw(tree_hurt(known, [*ODD, *RAW]))
        data = dumped(tree, draw(st.booleans()))
    return data if kind == "tree" else draw(bytes_hurt(data))


@st.composite
def lines_hurt(draw, data):
    """A file of JSON lines: some of them hurt, doubled or swapped."""
    lines = data.split(b"\n")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(places) % len(lines)
        try:
            json.loads(lines[at])
            lines[at] = draw(json_hurt(lines[at]))
        except (ValueError, RecursionError):
            lines[at] = draw(bytes_hurt(lines[at]))
    data = b"\n".join(lines)
    return draw(bytes_hurt(data)) if draw(st.integers(0, 3)) == 3 else data


# --- files with a structure of their own


def with_header(header, rest):
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + rest


@st.composite
def safetensors_hurt(draw, data):
    """The header hurt as JSON, its length right or not; or any byte."""
    if draw(st.integers(0, 3)) == 3:
        return draw(bytes_hurt(data))
    (size,) = struct.unpack("<Q", data[:8])
    tree = json.loads(data[8 : 8 + size])
    header = dumped(draw(tree_hurt(tree, [*ODD, *DTYPES, *RAW])), draw(st.booleans()))
    return with_header(header, data[8 + size :])


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "C64", "F4", "pt"]


def odd_tensors():
    """Tensors of types, sizes and layouts that no model has, some far larger than their memory."""
    warnings.simplefilter("ignore")  # of what torch has in beta, or no more
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool]
    kinds += [torch.complex64, torch.uint16, torch.float8_e4m3fn]
    yield from (torch.zeros(8, 8).to(kind) for kind in kinds)
    yield from (torch.zeros(size) for size in ((), (0,), (3,), (300, 8), (0, 2**40), (8,), (1, 8)))
    yield torch.zeros(1).expand(2**40)
    yield torch.zeros(1).expand(300, 8)
    yield torch.zeros(1, 1).expand(2**20, 2**20)
    yield torch.full((300, 8), float("nan"))
    yield torch.full((8,), float("inf"))
    yield torch.eye(8).to_sparse()
    yield torch.eye(8).to_sparse_csr()
    yield torch.empty(8, 8, device="meta")
    yield torch.empty(2**30, 2**20, device="meta")
    yield torch.nn.Parameter(torch.ones(8))
    yield torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8)
    yield torch.zeros(8, 8).t()[1:, ::2]
    yield torch.zeros(300, 8, dtype=torch.float32).conj()


@st.composite
def checkpoint_hurt(draw, data):
    """What torch.save has written, with other contents, and checksums that are right; or bytes."""
    if draw(st.integers(0, 5)) == 5:
        return draw(bytes_hurt(data))
    tree = torch.load(io.BytesIO(data), weights_only=True)
    out = io.BytesIO()
    with warnings.catch_warnings():
        tensors = draw(st.sampled_from([ODD, [*odd_tensors()]]))
        tree = draw(tree_hurt(tree, tensors))
        torch.save(tree, out)
    return out.getvalue()


def zstd(data):
    import pyarrow

    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as f:
        f.write(data)
    return out.getvalue().to_pybytes()


def unzstd(data):
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()


PACKERS = {
    ".gz": (gzip.decompress, lambda data: gzip.compress(data, mtime=0)),
    ".xz": (lzma.decompress, lzma.compress),
    ".zst": (unzstd, zstd),
}


@st.composite
def packed_hurt(draw, name, data):
    """A compressed file whose contents are hurt, or whose bytes are."""
    if draw(st.booleans()):
        return draw(bytes_hurt(data))
    unpack, pack = PACKERS["." + name.rsplit(".", 1)[-1]]
    return pack(draw(hurt(name.rsplit(".", 1)[0], unpack(data))))


@st.composite
def tar_hurt(draw, data):
    """A tar with the checksums of its headers right again, or wrong."""
    data = bytearray(draw(bytes_hurt(data)))
    for at in range(0, len(data) - 511, 512) if draw(st.booleans()) else ():
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def hurt(name, data):
    """The damage that fits a file, by its name."""
    if name.endswith(tuple(PACKERS)):
        return packed_hurt(name, data)
    for suffix, kind in KINDS.items():
        if name.endswith(suffix):
            return kind(data)
    return bytes_hurt(data)


KINDS = {
    ".json": json_hurt,
    ".jsonl": lines_hurt,
    ".safetensors": safetensors_hurt,
    ".pt": checkpoint_hurt,
    ".tar": tar_hurt,
}


@st.composite
def folders(draw, seeds, names):
    """A folder, file by file, of those in `seeds`, of which one or two of `names` are hurt.

    names: suffixes of the files that may be.
    """
    files = dict(draw(st.sampled_from(seeds)))
    able = [name for name in files if name.endswith(tuple(names))]
    for name in draw(st.lists(st.sampled_from(able), min_size=1, max_size=2, unique=True)):
        files[name] = draw(hurt(name, files[name]))
    return files


@st.composite
def mended(draw, strategy, mend):
    """Every second one of the folders put right by a function."""
    files = draw(strategy)
    return mend(files) if draw(st.booleans()) else files
