"""The two language models: small Llamas from `transformers`, made from a config, never downloaded."""

import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN = 192
TEACHER_LAYERS = 4
STUDENT_LAYERS = (0, 3)  # the teacher's layers that the student starts from


def build(vocab_size: int, layers: int) -> LlamaForCausalLM:
    """A freshly initialised Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 48,
        num_key_value_heads=HIDDEN // 48,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


class FrequentVocabulary:
    """The vocabulary as a short training needs it: the frequent tokens, and one for all the others.

    All rare tokens share one row of the (tied) embedding. Then the softmax over all entries needs
    only the columns of the frequent ones and one more, weighted by how many it stands for: the
    exact full-vocabulary cross-entropy, many times cheaper. `expand` writes the row out again.
    """

    def __init__(self, tokens: Tensor, vocab_size: int, size: int) -> None:
        counts = torch.bincount(tokens, minlength=vocab_size)
        self.frequent = counts.argsort(descending=True, stable=True)[: size - 1].sort().values
        self.shared = len(self.frequent)
        self.size = self.shared + 1
        self.index = torch.full((vocab_size,), self.shared)
        self.index[self.frequent] = torch.arange(self.shared)
        self.log_shared = math.log(vocab_size - self.shared)

    def loss(self, model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over the full vocabulary, up to a constant."""
        logits = model(input_ids=self.index[ids]).logits
        logits[..., self.shared] += self.log_shared
        labels = torch.where(labels >= 0, self.index[labels.clamp_min(0)], labels)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def expand(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        """The same model over the whole vocabulary."""
        full = build(len(self.index), model.config.num_hidden_layers)
        state = model.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in state:
                state[name] = state[name][self.index]
        full.load_state_dict(state)
        return full.eval().requires_grad_(False)
