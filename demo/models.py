"""The language models: small Llamas of `transformers`, made from a config, never downloaded."""

import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, TEACHER_LAYERS, STUDENT_LAYERS = 128, 2, 1
FREQUENT_TOKENS = 12288
EMBEDDING = "model.embed_tokens.weight"


def build(vocab_size: int, layers: int) -> LlamaForCausalLM:
    """Return a new Llama with tied embeddings, and attention heads of 32 entries."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 32,
        num_key_value_heads=HIDDEN // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def student_of(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a Llama that starts as the teacher without its last layers, as DistilBERT did."""
    student = build(teacher.config.vocab_size, STUDENT_LAYERS)
    names = student.state_dict().keys()
    student.load_state_dict({k: v for k, v in teacher.state_dict().items() if k in names})
    return student


class FrequentVocabulary:
    """A small vocabulary to train the teacher in a minute: frequent tokens and one more class.

    All rare tokens share one row of the (tied) embedding. The exact softmax over all entries then
    needs only the columns of the frequent ones and one more, weighted by the number of rare tokens.

    Args:
        tokens: (n,), the training text, whose frequencies count.
        vocab_size: entries of the full vocabulary.
    """

    def __init__(self, tokens: Tensor, vocab_size: int) -> None:
        counts = torch.bincount(tokens, minlength=vocab_size)
        frequent = counts.argsort(descending=True, stable=True)[:FREQUENT_TOKENS]
        self.shared = len(frequent)  # the class of all the others
        self.log_size = math.log(vocab_size - self.shared)
        self.class_of = torch.full((vocab_size,), self.shared)
        self.class_of[frequent] = torch.arange(self.shared)
        self.tokens = self.class_of[tokens]

    def build_teacher(self) -> LlamaForCausalLM:
        """Return a teacher over the classes; its embeddings start from co-occurrences of tokens."""
        teacher = build(self.shared + 1, TEACHER_LAYERS)
        with torch.no_grad():
            teacher.get_input_embeddings().weight.copy_(self.cooccurrence_embeddings())
        return teacher

    def cooccurrence_embeddings(self) -> Tensor:
        """Return embeddings (classes, HIDDEN) by latent semantic analysis.

        They are the leading singular vectors, scaled, of the positive pointwise mutual information
        of tokens that are one or two positions apart.
        """
        x, size = self.tokens, self.shared + 1
        pairs = torch.cat([torch.stack([x[:-gap], x[gap:]]) for gap in (1, 2)], dim=1)
        pairs = torch.cat([pairs, pairs.flip(0)], dim=1)
        ones = torch.ones(pairs.shape[1])
        shape = {"size": (size, size), "check_invariants": False}
        counts = torch.sparse_coo_tensor(pairs, ones, **shape).coalesce()
        (row, column), count = counts.indices(), counts.values()
        total = torch.zeros(size).index_add_(0, row, count)
        context = total.pow(0.75) / total.pow(0.75).sum()
        information = (count / (total[row] * context[column])).log().clamp_min(0)
        matrix = torch.sparse_coo_tensor(counts.indices(), information, **shape)
        left, strength, _ = torch.svd_lowrank(matrix, q=HIDDEN, niter=2)
        table = left * strength.sqrt()
        return 0.02 * table / table.std()

    def loss(self, teacher: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over the full vocabulary, 0-d, up to a constant.

        `teacher` is one of build_teacher(); ids and labels (B, S) are of the full vocabulary.
        """
        logits = teacher(input_ids=self.class_of[ids]).logits
        logits[..., self.shared] += self.log_size
        labels = torch.where(labels >= 0, self.class_of[labels.clamp_min(0)], labels)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def expand(self, teacher: LlamaForCausalLM) -> LlamaForCausalLM:
        """Return a frozen copy of `teacher` with an embedding for every entry of the vocabulary."""
        full = build(len(self.class_of), TEACHER_LAYERS)
        state = teacher.state_dict()
        state |= {name: state[name][self.class_of] for name in (EMBEDDING, "lm_head.weight")}
        full.load_state_dict(state)
        return full.eval().requires_grad_(False)
