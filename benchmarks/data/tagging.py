"""Words and their parts of speech: Universal Dependencies English EWT, or made-up sentences."""

from __future__ import annotations

import collections
import gzip
import pathlib
from typing import NamedTuple

import numpy as np

type Sentences = list[list[tuple[str, str]]]


class Tagging(NamedTuple):
    """Sentences as arrays `[sentences, length]` of numbers, by the names "words", "suffixes" and "tags".

    Attributes:
      train: For training. 0 is padding, 1 a word or suffix that is not known.
      test: For testing.
      vocabulary: How many words and suffixes there are.
      tags: How many tags there are.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    vocabulary: int
    tags: int


def load(folder: pathlib.Path | None, length: int, at_least: int = 1) -> Tagging:
    """Return the data, cut or padded to one length.

    Args:
      folder: Where `en_ewt-ud-train.conllu` and `en_ewt-ud-test.conllu` lie, gzipped or not; None for made-up ones.
      length: Words of a sentence.
      at_least: How often a word or suffix must be in the training data to have a number of its own.

    Raises:
      FileNotFoundError: A file is missing.
    """
    if folder is None:
        return encode(made_up(2000, 0), made_up(400, 1), length, at_least)
    return encode(read_conllu(_find(folder, "train")), read_conllu(_find(folder, "test")), length, at_least)


def read_conllu(path: pathlib.Path) -> Sentences:
    """Return the sentences of a CoNLL-U file as pairs of a word and its universal tag."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        blocks = file.read().split("\n\n")
    rows = [[line.split("\t") for line in block.splitlines() if line[:1].isdigit()] for block in blocks]
    return [[(row[1].lower(), row[3]) for row in block if row[0].isdigit()] for block in rows if block]


def made_up(count: int, seed: int) -> Sentences:
    """Return sentences made of forty words, the tag of each depending on it and on the word before it."""
    draw = np.random.default_rng(seed)
    numbers = [draw.integers(0, 40, draw.integers(4, 20)) for _ in range(count)]
    return [
        [(f"word{word}", f"tag{(word + before) % 5}") for before, word in zip([0, *sentence], sentence, strict=False)]
        for sentence in numbers
    ]


def encode(train: Sentences, test: Sentences, length: int, at_least: int = 1) -> Tagging:
    """Return both parts as numbers; what only the second has, or the first too seldom, is not known."""
    tags = {tag: i + 1 for i, tag in enumerate(sorted({tag for sentence in train for _, tag in sentence}))}
    counts = collections.Counter(
        piece for sentence in train for word, _ in sentence for piece in (word, "-" + word[-3:])
    )
    pieces = sorted(piece for piece, count in counts.items() if count >= at_least)
    known = {piece: i + 2 for i, piece in enumerate(pieces)}

    def arrays(sentences: Sentences) -> dict[str, np.ndarray]:
        out = {name: np.zeros((len(sentences), length), np.int32) for name in ("words", "suffixes", "tags")}
        for i, sentence in enumerate(sentences):
            for j, (word, tag) in enumerate(sentence[:length]):
                out["words"][i, j] = known.get(word, 1)
                out["suffixes"][i, j] = known.get("-" + word[-3:], 1)
                out["tags"][i, j] = tags.get(tag, 0)
        return out

    return Tagging(arrays(train), arrays(test), len(known) + 2, len(tags) + 1)


def _find(folder: pathlib.Path, part: str) -> pathlib.Path:
    found = sorted(folder.glob(f"en_ewt-ud-{part}.conllu*"))
    if not found:
        raise FileNotFoundError(f"{folder} has no en_ewt-ud-{part}.conllu.")
    return found[0]
