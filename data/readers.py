"""The texts of one part of a source, whatever kind of file they are in."""

import csv
import functools
import io
import itertools
import json
import re
import shutil
import string
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import archives, members, splits
from data.archives import BLOCK, CLEANED, Member, damage
from data.hub import fetch
from data.parts import (
    ARCHIVES,
    DAMAGE,
    MIB,
    BadData,
    Conversation,
    Note,
    Part,
    Reading,
    WrongSetting,
    content,
    kind,
)
from data.stdlib import stdlib_conversations, stdlib_documents
from text import encoding
from text.files import utf8_decoder
from text.turns import CHAT_COLUMNS, COLUMNS, columns_of, conversation, conversation_columns

MAX_LINE = 64 * MIB  # bytes of one .jsonl line, or of one text of a .parquet or .arrow
MAX_MEMBER = 16 * MIB  # bytes of one text of OpenWebText's archives
MAX_LINES = 2**20  # of one row of a .csv, in quotes
QUOTED = re.compile('"(?:[^"]|"")*"')
IN_QUOTES = "a quote in a field in quotes is written twice, and a field in quotes ends with one"
NO_QUOTES = "a .tsv has no fields in quotes: name it .csv if this one has"
AS_THEY_ARE = f".tsv read with the quotes around fields ({NO_QUOTES})"
UTF8 = "read as UTF-8, which they are"
EMPTY = "empty texts, each a document of end-of-text alone"
TALKS = "conversations by the column"
SAID = (UTF8, AS_THEY_ARE, EMPTY, TALKS, splits.MAY_SAY)  # notes that begin so: nothing is left out
ROWS = "files of rows in archives"  # of a note that tells that a column was asked for

# What a reader yields: a text, a text in blocks (a long file), a conversation, damage, or a note.
Document = str | Iterator[str] | Conversation | BadData | Note


def documents(part: Part, reading: Reading, folder: Path) -> Iterator[Document]:
    """The documents of a part in order, damage and notes among them.

    Reading goes on after a bad document, and with the next file after a damaged one. `folder` is
    where a Hub file is put; it is deleted when it has been read. Raises ValueError when the
    column is not there, FileNotFoundError, and OSError when a download fails.
    """
    if not part.files and reading.chat:
        for turns in stdlib_conversations():
            yield Conversation(turns, (), lambda: "the embedded corpus")
    elif not part.files:
        yield from stdlib_documents()
    elif part.repo:
        path, ours = fetch(part, folder)
        yield from file_documents(replace(part, files=(str(path),)), str(path), reading)
        if ours:
            assert folder.suffix == ".hub", "made for this and nothing else"
            shutil.rmtree(folder, ignore_errors=True)
    else:
        for file in part.files:
            yield from file_documents(part, file, reading)


def file_documents(part: Part, file: str, reading: Reading) -> Iterator[Document]:
    """The documents of one file; see `documents`."""
    what = content(file)
    try:
        if what == "parquet":
            yield from parquet_documents(file, reading, part.start, part.end)
        elif what == "arrow":
            yield from arrow_documents(file, reading)
        elif what in ARCHIVES:
            yield from archive_documents(file, reading, part)
        else:
            with archives.unpacked(file) as f:
                yield from stream_documents(f, file, reading, part.start, part.end)
    except (FileNotFoundError, PermissionError, WrongSetting):
        raise
    except DAMAGE as e:
        yield damage(file, e)


def stream_documents(
    f: io.BufferedIOBase, where: str, reading: Reading, start: int = 0, end: int = 0
) -> Iterator[Document]:
    """The documents of an unpacked stream, by the name that `where` ends with."""
    what = content(where)
    if reading.encoding:
        name, read_as = reading.encoding, encoding.of(peek(f), reading.encoding)
        if read_as != name:
            yield Note(f"{UTF8}, not in {name}", where)
        f = io.BufferedReader(encoding.AsUtf8(f, read_as, where))
    if what == "text" and reading.chat:
        yield Note("files of text, which hold no conversations", where)
    elif what == "text":
        yield from text_documents(f, where, reading.separator)
    elif what == "lines":
        yield from lines_documents(f, where, reading, start, end)
    elif what == "json":
        yield from json_documents(f, where, reading)
    else:
        yield from table_documents(f, where, reading)


def peek(f: io.BufferedIOBase) -> bytes:
    """The next bytes of a stream, some or many, which stay there."""
    assert isinstance(f, io.BufferedReader)
    return f.peek(1)


# --- text


def text_documents(f: io.BufferedIOBase, where: str, separator: str) -> Iterator[Document]:
    """A text file is one document, or several with `separator` between them."""
    blocks = text_blocks(f, where)
    if separator:
        yield from separated(blocks, where, separator)
        return
    try:
        head = list(itertools.islice(blocks, 2))
    except DAMAGE as e:
        yield damage(where, e)
        return
    if head and head[0].count("\0") > len(head[0]) / 4:
        yield BadData(f"{where} has zero bytes between letters{encoding.hint(head[0].encode())}")
        return
    yield "".join(head) if len(head) < 2 else itertools.chain(head, blocks)


def text_blocks(f: io.BufferedIOBase, where: str) -> Iterator[str]:
    """UTF-8 text in blocks, without a byte order mark, newlines as \\n. Raises BadData."""
    utf8, seen, last = utf8_decoder(), 0, b""
    while True:
        try:
            data = f.read(BLOCK)
            seen, last = seen + len(data), data or last
            text = utf8.decode(data, final=not data)
        except UnicodeDecodeError as e:
            place = seen - len(e.object) + e.start
            hint = encoding.hint(e.object if data else last)
            raise BadData(f"{where} is not UTF-8 text ({e.reason} at byte {place}){hint}") from e
        except DAMAGE as e:
            raise damage(where, e) from e
        if text:
            yield text
        if not data:
            return


def separated(blocks: Iterable[str], where: str, separator: str) -> Iterator[Document]:
    """Texts between separators, blank lines around them taken off.

    Where there is nothing between two there is no document, which is told.
    """
    rest, found = "", False
    for block in blocks:
        *texts, rest = (rest + block).split(separator)
        for text in (t.strip("\n") for t in texts):
            if text:
                yield text
            elif found:
                yield Note("empty texts between separators", where)
            if not found:
                found = True
                yield Note("separators", where)
        if len(rest) > MAX_LINE:
            raise BadData(
                f"{where}: a text of more than {MAX_LINE // MIB} MiB without the separator "
                f"{separator!r}"
            )
    if rest.strip("\n"):
        yield rest.strip("\n")


# --- rows


@functools.cache
def template_fields(template: str) -> list[tuple[str, str | None]]:
    """(text, column behind it or None) of a template such as "{title}\\n\\n{text}".

    Raises ValueError for one that is not only columns in braces.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as e:
        raise ValueError(f"template {template!r}: {e}; write a brace of the text twice") from e
    if not any(name for _, name, _, _ in parsed):
        raise ValueError(f"template {template!r} has no column in braces, such as {{text}}")
    for _, name, form, conversion in parsed:
        if name == "" or form or conversion:
            raise ValueError(f"template {template!r}: braces hold the name of a column, no more")
    return [(text, name) for text, name, _, _ in parsed]


def columns(reading: Reading) -> list[str]:
    """The columns that a row's text is made of; none for conversations, which are found."""
    if reading.chat:
        return []
    if not reading.template:
        return [reading.column]
    return [name for _, name in template_fields(reading.template) if name]


def text_of(row: Any, reading: Reading, where: str) -> str | Conversation:
    """The text of a row, which may itself be one. Raises BadData for null and what is no text.

    Or its conversation, where rows are some.
    """
    if reading.chat:
        if not isinstance(row, dict):
            raise BadData(f"{where}: {named(row)} instead of a row with columns")
        try:
            used = columns_of(row)
            return Conversation(conversation(row, used), used, lambda: where)
        except ValueError as e:
            raise BadData(f"{where}: {e}") from e
    if not reading.template:
        value = row if isinstance(row, str) else value_in(row, reading.column, where)
        if isinstance(value, str):
            return value
        raise BadData(f"{where}: {named(value)} instead of text in column {reading.column!r}")
    pieces = []
    for text, name in template_fields(reading.template):
        pieces.append(text)
        if name:
            value = value_in(row, name, where)
            if not isinstance(value, str | int | float):
                raise BadData(f"{where}: {named(value)} instead of text in column {name!r}")
            pieces.append(str(value))
    return "".join(pieces)


def named(value: Any) -> str:
    """What kind of thing a value is, for people."""
    kinds = {type(None): "null", list: "a list", dict: "an object", bool: "true or false"}
    number = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return kinds.get(type(value), number)


def value_in(row: Any, column: str, where: str) -> Any:
    """The value in a column, or at a path with dots. Raises BadData where there is none."""
    if isinstance(row, dict) and column in row:
        return row[column]
    value = row
    for name in column.split("."):
        if value is None and row is not None:
            return None
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(map(str, row)) if isinstance(row, dict) else named(row)
            talks = isinstance(row, dict) and bool({*row} & {*COLUMNS})
            raise BadData(
                f"{where}: no text in column {column!r} (there: {there[:200]}); set --text_column "
                f"or --template{', or --chat=True for conversations' * talks}"
            )
        value = value[name]
    return value


def lines_documents(
    f: io.BufferedIOBase, where: str, reading: Reading, start: int, end: int
) -> Iterator[Document]:
    """One document a line, of the lines that begin in bytes start .. end - 1; blank ones left out.

    Lone surrogates (\\ud800 in JSON) become U+FFFD when they are encoded.
    """
    at, number = start, 0
    if start:  # the line that the byte before belongs to is the previous part's
        f.seek(start - 1)
        at = start - 1 + skip_line(f, end - start + 1)
    while not end or at < end:
        line = f.readline(MAX_LINE + 1)
        if not line:
            return
        at, number = at + len(line), number + 1
        if len(line) > MAX_LINE:
            at += skip_line(f)
            yield BadData(
                f"{line_name(where, start, number)}: a line of more than {MAX_LINE // MIB} MiB; "
                "very long texts are read in pieces from .txt files"
            )
        elif line.strip():
            yield line_document(line, where, start, number, reading)


def line_document(
    line: bytes, where: str, start: int, number: int, reading: Reading
) -> str | Conversation | BadData:
    """The text of a line of JSON, the number-th of a part that begins at byte `start`."""
    try:
        found = text_of(json.loads(line), reading, where)
        if isinstance(found, Conversation):
            return found._replace(where=lambda: line_name(where, start, number))
        return found
    except BadData as e:
        return BadData(str(e).replace(where, line_name(where, start, number), 1))
    except UnicodeDecodeError as e:
        what = f"not UTF-8 text ({e.reason}){encoding.hint(line)}"
        return BadData(f"{line_name(where, start, number)}: {what}")
    except (ValueError, RecursionError) as e:
        return BadData(f"{line_name(where, start, number)}: not JSON ({e})")


def skip_line(f: io.BufferedIOBase, enough: float = float("inf")) -> int:
    """Read to the end of the line, or so far that at least `enough` bytes are read: how many."""
    read = 0
    while (piece := f.readline(MIB)) and not piece.endswith(b"\n"):
        read += len(piece)
        if read >= enough:
            return read
    return read + len(piece)


def line_name(file: str, start: int, number: int) -> str:
    """ "FILE line N" of the number-th line read by a part that begins at byte `start`."""
    return f"{file} line {number + lines_before(file, start) if start else number}"


@functools.lru_cache(1)
def lines_before(file: str, start: int) -> int:
    """Lines of a file that begin before byte `start`."""
    lines, left = 0, start - 1
    with open(file, "rb") as f:
        while left and (block := f.read(min(MIB, left))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines + 1


def json_documents(f: io.BufferedIOBase, where: str, reading: Reading) -> Iterator[Document]:
    """The rows of a .json: one array of them, or one after another, a line each or not."""
    first, newline, _ = peek(f).removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    try:  # a first line that is a row: bad ones can be told apart then
        lines = bool(newline) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        lines = False
    if lines:
        yield from lines_documents(f, where, reading, 0, 0)
        return
    for number, row in enumerate(json_values(text_blocks(f, where), where), 1):
        try:
            yield text_of(row, reading, f"{where} row {number}")
        except BadData as e:
            yield e


def json_values(blocks: Iterable[str], where: str) -> Iterator[Any]:
    """The values of an array, or values one after another, as they come. Raises BadData."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    rest, wanted, array, ended = "", 0, None, False
    for block in itertools.chain(blocks, [""]):
        rest += block
        if block and len(rest) < wanted:
            continue
        at = end_of(blank, rest, 0)
        if array is None and at < len(rest):
            array = rest[at] == "["
            at = end_of(blank, rest, at + 1) if array else at
        while at < len(rest):
            if ended:
                raise BadData(f"{where} is not JSON: something follows the end of its array")
            if array and rest[at] == "]":
                ended, at = True, end_of(blank, rest, at + 1)
                continue
            try:
                value, stop = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError) as e:
                if block and isinstance(e, ValueError) and len(rest) - at <= MAX_LINE:
                    break  # the rest of it may come
                raise BadData(f"{where} is not JSON ({e})") from e
            if block and stop == len(rest):
                break  # a number may go on
            yield value
            at = end_of(blank, rest, stop)
        rest = rest[at:]
        wanted = 2 * len(rest)
    if array and not ended:
        raise BadData(f"{where} is truncated: its array has no end")


def end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a match that begins at a place ends."""
    match = pattern.match(text, at)
    return match.end() if match else at


def table_documents(f: io.BufferedIOBase, where: str, reading: Reading) -> Iterator[Document]:
    """The rows of a .csv or .tsv, whose first line names the columns."""
    csv.field_size_limit(MAX_LINE)
    lines = text_lines(text_blocks(f, where), where)
    first = next(lines, "")
    form = table_form(first, ".tsv" in (kind(where) or ""))
    rows = table_rows(itertools.chain([first], lines), form)
    _, names = next(rows, (1, []))
    if isinstance(names, csv.Error):
        raise BadData(f"{where} is damaged: {names}")
    if not names:
        raise BadData(f"{where} does not begin with a line that names its columns")
    names = column_names(names, where, reading)
    plain, doubled = form["quoting"] == csv.QUOTE_NONE, False
    for number, row in rows:
        if isinstance(row, csv.Error):
            yield BadData(f"{where} line {number} is not a row: {row}; {IN_QUOTES}")
        elif row and len(row) != len(names):
            what = f"{where} line {number}: {len(row)} fields, not {len(names)}"
            yield BadData(f"{what}; {NO_QUOTES}" if plain else what)
        elif row:
            if plain and not doubled and any(map(is_quoted, row)):
                doubled = True
                yield Note(AS_THEY_ARE, where)
            try:
                yield text_of(dict(zip(names, row, strict=True)), reading, f"{where} line {number}")
            except BadData as e:
                yield e


def table_form(first: str, tabs: bool) -> dict[str, Any]:
    """How a table is written, as csv.reader takes it, by its first line.

    tabs: it is called .tsv. Such a file has no quotes (IANA, text/tab-separated-values), unless
    its columns' names are in some. Where blanks follow the commas between the names, they do so in
    the rows.
    """
    usual = "\t,;" if tabs else ",;\t"
    delimiter = next((d for d in usual if d in first), usual[0])
    plain = tabs and delimiter == "\t" and not first.startswith('"')
    _, *names = first.strip("\n").split(delimiter)
    return {
        "delimiter": delimiter,
        "quoting": csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
        "skipinitialspace": bool(names) and all(name[:1] == " " for name in names),
        "strict": True,
    }


def table_rows(
    lines: Iterator[str], form: dict[str, Any]
) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The rows of a table, each with the number of its first line, or why it is none.

    Where a line begins something that is no row, the next line begins one again, so that a quote
    without its other half costs no more than its line.
    """
    again: deque[str] = deque()
    taken: list[str] = []

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, "")) and len(taken) < MAX_LINES:
            taken.append(line)
            yield line
        if line:
            again.appendleft(line)
            raise csv.Error(f"it goes on for {MAX_LINES:,} lines")

    number, rows = 1, csv.reader(feed(), **form)
    while True:
        taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            yield number, e
            again.extendleft(reversed(taken[1:]))
            number, rows = number + 1, csv.reader(feed(), **form)
        else:
            yield number, row
            number += len(taken)


def is_quoted(field: str) -> bool:
    """Whether a field looks like one in quotes with quotes in it, which are written twice then."""
    return field[:1] == '"' and '""' in field[1:-1] and re.fullmatch(QUOTED, field) is not None


def column_names(names: list[str], where: str, reading: Reading) -> list[str]:
    """The names of a table's columns, without blanks around them where no other are asked for.

    Raises WrongSetting for a column that is not there.
    """
    if reading.chat or not {*columns(reading)} <= {*names}:
        names = [name.strip() for name in names]
    if reading.chat:
        check_turns(where, names)
    for column in columns(reading):
        if names.count(column) != 1:
            problem = "has no column" if column not in names else "has several columns"
            mark = next((m for m in "|:^~" if len(names) == 1 and m in names[0]), "")
            hint = f"; commas, semicolons and tabs separate columns, {mark!r} does not: save it so"
            raise WrongSetting(
                f"{where} {problem} {column!r}; it has {', '.join(names)[:200]}: set --text_column"
                + (hint if mark else "")
            )
    return names


def text_lines(blocks: Iterable[str], where: str) -> Iterator[str]:
    """The lines of a text, each with its newline. Raises BadData for one that is too long."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        if len(rest) > MAX_LINE:
            raise BadData(f"{where}: a line of more than {MAX_LINE // MIB} MiB")
        for line in lines:
            yield line + "\n"
    if rest:
        yield rest


# --- Arrow


def parquet_documents(file: str, reading: Reading, start: int, end: int) -> Iterator[Document]:
    """The texts of row groups start .. end - 1, about 16 MiB in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = check_columns(file, reading, pyarrow.parquet.read_schema(file))
        # as a dictionary a text that is repeated is in memory once, however hostile the file
        leaves = text_leaves(file, names) if reading.chat else names
        with pyarrow.parquet.ParquetFile(file, read_dictionary=leaves) as table:
            number = sum(table.metadata.row_group(i).num_rows for i in range(start))
            for i in range(start, end or table.num_row_groups):
                group = table.metadata.row_group(i)
                row_bytes = group.total_byte_size // max(1, group.num_rows) + 1
                rows = min(1000, max(1, 16 * MIB // row_bytes))
                wanted: dict[str, Any] = {"columns": names, "row_groups": [i]}
                for batch in table.iter_batches(rows, use_threads=False, **wanted):
                    yield from batch_documents(batch, file, reading, number)
                    number += batch.num_rows
    except pyarrow.ArrowException as e:
        raise damage(file, e) from e


def arrow_documents(file: str, reading: Reading) -> Iterator[Document]:
    """The texts of an Arrow file, as datasets.save_to_disk writes it (stream) or pyarrow (file)."""
    import pyarrow

    try:
        with pyarrow.memory_map(file) as memory:
            try:
                reader = pyarrow.ipc.open_stream(memory)
                batches: Iterable[Any] = reader
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(memory)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            names, number = check_columns(file, reading, reader.schema), 0
            tops = list(dict.fromkeys(top_of(reader.schema, name) for name in names))
            for batch in batches:
                batch = batch.select(tops)
                for values in batch.columns:
                    # offsets that lead out of the file would crash the process; as bytes, so that
                    # text that is not UTF-8 is one bad row and not a bad file
                    raw = {pyarrow.string(): pyarrow.binary()}.get(values.type)
                    raw = {pyarrow.large_string(): pyarrow.large_binary()}.get(values.type, raw)
                    (values.view(raw) if raw else values).validate(full=True)
                yield from batch_documents(batch, file, reading, number)
                number += batch.num_rows
    except pyarrow.ArrowException as e:
        raise damage(file, e) from e


def text_leaves(file: str, names: list[str]) -> list[str]:
    """The paths of the texts inside a .parquet's columns."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        leaves = [table.schema.column(i) for i in range(len(table.schema))]
    inside = [leaf for leaf in leaves if leaf.path.split(".")[0] in names]
    return [leaf.path for leaf in inside if leaf.physical_type == "BYTE_ARRAY"]


def top_of(schema: Any, column: str) -> str:
    """The column that holds a column with dots in its name, or is called so."""
    return column if column in schema.names else column.split(".")[0]


def is_text(what: Any) -> bool:
    """Whether an Arrow type is one of text."""
    import pyarrow.types as kinds

    what = what.value_type if kinds.is_dictionary(what) else what
    return bool(kinds.is_string(what) or kinds.is_large_string(what) or kinds.is_string_view(what))


def check_columns(file: str, reading: Reading, schema: Any) -> list[str]:
    """The columns that are read. Raises WrongSetting for one that is not there or holds no text."""
    import pyarrow.types as kinds

    if reading.chat:
        return check_turns(file, schema.names)
    texts = ", ".join(f.name for f in schema if is_text(f.type)) or "none"
    names = columns(reading)
    for name in names:
        top, *below = [name] if name in schema.names else name.split(".")
        if schema.names.count(top) != 1:
            problem = "several columns" if top in schema.names else "no column"
            raise WrongSetting(
                f"{file} has {problem} {name!r}; it has {', '.join(schema.names)[:200]}: "
                "set --text_column or --template"
            )
        what = schema.field(top).type
        for step in below:
            inside = [what.field(i).name for i in range(what.num_fields)]
            if not kinds.is_struct(what) or step not in inside:
                raise WrongSetting(
                    f"{file} has no column {name!r}; {top} is {str(what)[:200]}: set --text_column"
                )
            what = what.field(inside.index(step)).type
        plain = is_text(what) or (reading.template and kinds.is_primitive(what))
        if not plain:
            raise WrongSetting(
                f"{file}: column {name!r} holds {str(what)[:200]}, not text; columns of text: "
                f"{texts}: set --text_column"
            )
    return names


def check_turns(file: str, there: list[str]) -> list[str]:
    """The columns that conversations are made of. Raises WrongSetting where there are none."""
    known = [name for name in there if name in CHAT_COLUMNS]
    try:
        conversation_columns(known, there)
    except ValueError as e:
        raise WrongSetting(f"{file} has no conversations: {e}") from e
    return known


def batch_documents(batch: Any, file: str, reading: Reading, number: int) -> Iterator[Document]:
    """The texts of a batch of rows, one in memory at a time; what is not text is damage.

    number: rows of the file before it.
    """
    names = batch.schema.names
    for values in zip(*batch.columns, strict=True):
        number += 1
        where = f"{file} row {number}"
        try:
            row = {name: value.as_py() for name, value in zip(names, values, strict=True)}
            text = text_of(row, reading, where)
        except UnicodeDecodeError:
            yield BadData(f"{where}: not UTF-8 text")
        except BadData as e:
            yield e
        else:
            turns = text.turns if isinstance(text, Conversation) else []
            size = sum(len(t.content) for t in turns) if turns else len(text)
            if size > MAX_LINE:
                yield BadData(f"{where}: {size // MIB} MiB of text, more than is read")
            else:
                yield text


# --- archives


def archive_documents(file: str, reading: Reading, part: Part) -> Iterator[Document]:
    """The texts of an archive, in its order, that are of a part's split."""
    if kind(file) == CLEANED:
        with archives.unpacked(file) as f:
            yield from cleaned_documents(f, file, reading)
        return
    choice, second = chosen_in(file, reading, part)
    for member in archives.members(file):
        if isinstance(member.stream, BadData):
            yield member.stream
        elif member.stream is not None and choice.reads(member.path, second):
            if not second and splits.may_say(member.path):
                yield Note(splits.MAY_SAY, member.where)
            yield from member_documents(member, reading)
        elif not second:  # what is left out is told once
            link = member.stream is None
            if why := "link in an archive" if link else choice.left_out(member.path):
                yield Note(why, member.where)


def chosen_in(file: str, reading: Reading, part: Part) -> tuple[members.Choice, bool]:
    """What a part has of an archive; whether it is for validation beside a part for training."""
    split, val_split = reading.split, reading.val_split
    if part.named:
        split, val_split = val_split if part.val else split, ""
    return members.choice(file, split, val_split, part.named), part.val and not part.named


def cleaned_documents(f: io.BufferedIOBase, where: str, reading: Reading) -> Iterator[Document]:
    """The texts of a piece of OpenWebText's own download.

    As the script that came with it read its pieces, with the same clean-up.
    """
    for name, size, stream in archives.tar_members(f, where):
        member = Member(name, f"{where}:{name}", size, stream)
        if why := "link in an archive" if stream is None else members.unread(name):
            yield Note(why, member.where)
        elif name.endswith(".txt"):
            yield cleaned_text(stream, member.where)
        else:
            yield from member_documents(member, reading)


def member_documents(member: Member, reading: Reading) -> Iterator[Document]:
    """The documents of a file in an archive."""
    where, tar = member.where, content(member.path) == "tar"
    if not tar and content(member.path) != "text":
        yield Note(ROWS, where)
    try:
        f = archives.unpacked_stream(member.stream, member.size, where)
        read = cleaned_documents if tar else stream_documents
        yield from read(f, where, reading)
    except WrongSetting:
        raise
    except DAMAGE as e:
        yield damage(where, e)


def cleaned_text(member: Any, where: str) -> str | BadData:
    """A text of OpenWebText's archives."""
    data = member.read(MAX_MEMBER + 1)
    if len(data) > MAX_MEMBER:
        return BadData(f"{where}: a text of more than {MAX_MEMBER // MIB} MiB")
    try:
        return re.sub("\n\n\n+", "\n\n", data.decode("utf-8")).strip()
    except UnicodeDecodeError as e:
        return BadData(f"{where} is not UTF-8 text ({e.reason} at byte {e.start})")
