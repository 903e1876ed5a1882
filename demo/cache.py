"""The teacher's top k on disk, from which the fourth student learns without running a teacher."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from demo.progress import Progress
from demo.train import TEMPERATURE, head
from fused_kd import TopK
from fused_kd.options import MIB
from fused_kd.teachers import TopKDataset, TopKWriter, collate, measure

K = 64


class Cache:
    """The top k of a teacher for windows of text, in a folder; called with ids, it reads theirs.

    Args:
        folder: as written by `write`.
        windows: (n, S), the windows in the order of the folder; later ones that are equal replace
            earlier ones.
    """

    def __init__(self, folder: Path, windows: Tensor) -> None:
        self.samples = TopKDataset(folder, list(windows))
        self.numbers = {tuple(window): i for i, window in enumerate(windows.tolist())}

    def __call__(self, ids: Tensor) -> TopK:
        """Read the TopK (B, S, k) of windows (B, S); a KeyError if one is not in the cache."""
        samples = [self.samples[self.numbers[tuple(window)]] for window in ids.tolist()]
        topk: TopK = collate(samples)["teacher"]
        return topk


@torch.no_grad()
def write(
    teacher: LlamaForCausalLM, batches: list[tuple[Tensor, Tensor]], folder: Path, k: int = K
) -> Cache:
    """Run the teacher once over the batches (ids, labels), write its top k, and open the cache.

    The tail is exact: the mass of all other tokens, summed over them. The logits exist for a few
    rows at a time.
    """
    settings = {"vocabulary": teacher.config.vocab_size, "k": k, "temperature": TEMPERATURE}
    with TopKWriter(folder, **settings) as writer, Progress("cache", len(batches)) as progress:
        for ids, _ in batches:
            writer.write(ids, measure(head(teacher, ids), k, TEMPERATURE))
            size = sum(path.stat().st_size for path in folder.iterdir())
            progress.advance(f"top {k} of {writer.rows:,} tokens: {size / MIB:.1f} MiB")
    return Cache(folder, torch.cat([ids for ids, _ in batches]))
