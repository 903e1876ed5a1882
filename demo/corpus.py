"""The text: Python's own standard library, tokenised with the tokenizer that mistral-common ships.

Nothing is downloaded. The files are ordered by a hash of their names, so that a part of them is
from all folders, and the same interpreter gives the same corpus.
"""

import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Folders whose text is tests, generated tables or other people's packages.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "ensurepip", "site-packages"}
SKIPPED_FOLDERS |= {"dist-packages", "__pycache__"}
TOKENIZER_FILE = "tekken_240911.json"  # 131,072 entries
HELD_OUT_EVERY = 10  # every tenth file is kept from training


@dataclass(frozen=True)
class Corpus:
    """Tokens for training and held-out tokens, from different files."""

    train: Tensor  # (n,), int64
    held_out: Tensor  # (m,), int64
    vocab_size: int
    files: int
    characters: int

    def batches(self, rows: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random windows of the training text, endlessly: (ids, labels), each (rows, length).

        Args:
            rows: windows in a batch.
            length: tokens in a window.
            seed: the same seed gives the same batches.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - length, (rows, 1), generator=generator)
            yield with_labels(self.train[starts + torch.arange(length)])

    def held_out_batches(self, rows: int, length: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return batches (ids, labels) of windows spread evenly over the held-out text.

        They have about `tokens` tokens together, and are the same in every call.
        """
        count = max(1, tokens // (rows * length)) * rows
        starts = torch.linspace(0, len(self.held_out) - length, count).long()
        windows = self.held_out[starts[:, None] + torch.arange(length)]
        return [with_labels(part) for part in windows.split(rows)]

    def unigram_perplexity(self) -> float:
        """Return the held-out text's perplexity under the token frequencies of training."""
        counts = torch.bincount(self.train, minlength=self.vocab_size).double() + 0.1
        return (counts / counts.sum())[self.held_out].log().mean().neg().exp().item()


def with_labels(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids (B, S) and their labels: the next token, and -100 at the end.

    The labels are shifted, never the logits: a slice of the logits would cost a second gradient.
    """
    return ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def load(train_tokens: int, held_out_tokens: int) -> Corpus:
    """Read and tokenise standard-library files until both parts have that many tokens."""
    from mistral_common import __file__ as package_file
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tokenizer = Tekkenizer.from_file(Path(package_file).parent / "data" / TOKENIZER_FILE)
    wanted = {"train": train_tokens, "held_out": held_out_tokens}
    parts: dict[str, list[int]] = {"train": [], "held_out": []}
    files = characters = 0
    for number, path in enumerate(library_files()):
        name = "held_out" if number % HELD_OUT_EVERY == 0 else "train"
        if len(parts[name]) < wanted[name]:
            text = path.read_text(encoding="utf-8", errors="replace")
            parts[name] += tokenizer.encode(text, bos=True, eos=True)
            files, characters = files + 1, characters + len(text)
        elif all(len(parts[part]) >= wanted[part] for part in parts):
            break
    train, held_out = (torch.tensor(parts[name][: wanted[name]]) for name in wanted)
    return Corpus(train, held_out, tokenizer.n_words, files, characters)


def library_files() -> list[Path]:
    """Return the paths of the standard library's source files, in a fixed, mixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not SKIPPED_FOLDERS.intersection(name.parts)]
    names.sort(key=lambda name: (zlib.crc32(name.as_posix().encode()), name))
    return [root / name for name in names]
