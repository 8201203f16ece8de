"""`attnzoo generate`."""

from __future__ import annotations

import argparse

import torch

from attnzoo import load
from attnzoo.model import generate


def generate_command(options: argparse.Namespace) -> int:
    """Print each prompt with its continuation; several prompts are separated by a line of dashes."""
    model, tokenizer = load(options.run, "cuda" if torch.cuda.is_available() else "cpu")
    prompts = [encode(tokenizer, prompt) for prompt in options.prompt]
    continuations = generate(
        model,
        prompts,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=[tokenizer.encode(text) for text in options.stop] or None,
    )
    texts = [tokenizer.decode(p + new) for p, new in zip(prompts, continuations, strict=True)]
    print(f"\n{'-' * 40}\n".join(texts))
    return 0


def encode(tokenizer: object, text: str) -> list[int]:
    """Token ids of a prompt; an empty one is the start of a document."""
    return tokenizer.encode(text) or [tokenizer.eos_id]
