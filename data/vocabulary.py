"""A tokenizer of the text's own: --tokenizer=train:8192."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from data import readers
from data.parts import BadData, Conversation, Note, Reading, Source

TRAIN_ON = 2**27  # characters that are learnt from, from the start of the source
# Learning takes the square of the length of a word, so one without an end is cut.
LONG = re.compile(r"\S{256}(?=\S)|\s{256}(?=\s)")


def texts(found: Source, reading: Reading, folder: Path, skip_bad: bool) -> Iterator[str]:
    """The first TRAIN_ON characters of a source's training split, no word beyond 256 of them.

    `folder` is for files of the Hub while they are read. Raises BadData unless skip_bad.
    """
    left = TRAIN_ON
    for part in found.parts:
        for document in readers.documents(part, reading, folder) if not part.val else ():
            try:
                if isinstance(document, BadData):
                    raise document
                if isinstance(document, Note):
                    continue
                if isinstance(document, Conversation):
                    document = (turn.content for turn in document.turns)
                for text in [document] if isinstance(document, str) else document:
                    yield from cut_words(text)
                    left -= len(text)
                    if left <= 0:
                        return
            except BadData:
                if not skip_bad:
                    raise


def cut_words(text: str) -> Iterator[str]:
    """A text, cut where a word (or a run of blanks) is longer than any that is worth a token."""
    start = 0
    for match in LONG.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def train_bpe(found: Source, size: int, reading: Reading, folder: Path, skip_bad: bool) -> str:
    """A byte-level BPE of `size` tokens, end-of-text among them, as a tokenizer.json's text.

    The other arguments are those of `texts`; `folder` is deleted. Says that it learns, and when
    the text is too little for so many. Raises ValueError for a size that does not hold the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < 257:
        raise ValueError(f"tokenizer=train:{size}: at least 257, the bytes and end-of-text")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=sys.stderr.isatty(),
    )
    print(f"learning {size:,} tokens from the text, at most {TRAIN_ON / 1e6:.0f} MB of it")
    try:
        tok.train_from_iterator(texts(found, reading, folder, skip_bad), trainer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if tok.get_vocab_size() < size:
        print(f"WARNING: the text has only enough for {tok.get_vocab_size():,} of {size:,} tokens")
    return str(tok.to_str())
