"""A tokenizer of the text's own: --tokenizer=train:8192."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from data import sources
from data.sources import BadData, Source

TRAIN_ON = 2**27  # characters that are learnt from, from the start of the source


def texts(
    found: Source, column: str, separator: str, folder: Path, skip_bad: bool
) -> Iterator[str]:
    """The first TRAIN_ON characters of a source, in documents and blocks.

    `folder` is for files of the Hub while they are read. Raises BadData unless skip_bad.
    """
    left = TRAIN_ON
    for part in found.parts:
        for document in sources.documents(part, column, separator, folder):
            try:
                if isinstance(document, BadData):
                    raise document
                for text in [document] if isinstance(document, str) else document:
                    yield text
                    left -= len(text)
                    if left <= 0:
                        return
            except BadData:
                if not skip_bad:
                    raise


def train_bpe(
    found: Source, size: int, column: str, separator: str, folder: Path, skip_bad: bool
) -> str:
    """A byte-level BPE of `size` tokens, end-of-text among them, as a tokenizer.json's text.

    The other arguments are those of `texts`; `folder` is deleted. Raises ValueError for a size
    that does not hold the bytes.
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
        show_progress=False,
    )
    try:
        tok.train_from_iterator(texts(found, column, separator, folder, skip_bad), trainer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return str(tok.to_str())
