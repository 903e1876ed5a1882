"""The vocabulary and hidden size of well-known models."""

from __future__ import annotations

#: Hidden size of each model, by vocabulary (rows of lm_head, padding included). Checked against
#: published configurations.
_FAMILIES = {
    32000: {"llama-2-7b": 4096, "llama-2-13b": 5120, "llama-2-70b": 8192},
    128256: {"llama-3.2-1b": 2048, "llama-3.2-3b": 3072, "llama-3-8b": 4096, "llama-3.1-8b": 4096}
    | {"llama-3-70b": 8192, "llama-3.1-70b": 8192, "llama-3.3-70b": 8192, "llama-3.1-405b": 16384},
    151936: {"qwen2.5-0.5b": 896, "qwen2.5-1.5b": 1536, "qwen2.5-3b": 2048, "qwen3-0.6b": 1024}
    | {"qwen3-1.7b": 2048, "qwen3-4b": 2560, "qwen3-8b": 4096, "qwen3-14b": 5120}
    | {"qwen3-32b": 5120, "qwen3-30b-a3b": 2048, "qwen3-235b-a22b": 4096},
    152064: {"qwen2.5-7b": 3584, "qwen2.5-14b": 5120, "qwen2.5-32b": 5120, "qwen2.5-72b": 8192},
    256000: {"gemma-2-2b": 2304, "gemma-2-9b": 3584, "gemma-2-27b": 4608},
    262144: {"gemma-3-270m": 640, "gemma-3-1b": 1152},
    262208: {"gemma-3-4b": 2560, "gemma-3-12b": 3840, "gemma-3-27b": 5376},
    32768: {"mistral-7b-v0.3": 4096},
    131072: {"ministral-8b": 4096, "mistral-nemo-12b": 5120, "mistral-small-24b": 5120},
    50257: {"gpt2": 768, "gpt2-medium": 1024, "gpt2-large": 1280, "gpt2-xl": 1600},
    32064: {"phi-3-mini": 3072},
    100352: {"phi-4": 5120},
    200064: {"phi-4-mini": 3072},
}
#: Vocabulary and hidden size by name.
MODELS = {name: (v, h) for v, models in _FAMILIES.items() for name, h in models.items()}
