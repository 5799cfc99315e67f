"""A text model, its tokenizer and sentences for it, all tiny, made up and on disk: no network."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "oak",
    "rose",
    "sees",
    "likes",
    "eats",
    "old",
    "young",
    "green",
    "and",
    "but",
]
END = "<end>"


def save_tiny_text(folder: Path, width: int, n_sentences: int = 200) -> Path:
    """A two-block GPT-2 in `folder`/model, random; and `folder`/sentences, which `datasets` reads.

    SAELens reaches Hugging Face's hub by name for a `HookedTransformer`, and to check the tokenizer
    of a tokenised dataset; a local folder as `AutoModelForCausalLM` and plain text need neither.
    """
    vocabulary = {word: i for i, word in enumerate([END, *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token=END))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=END, eos_token=END)
    tokenizer.save_pretrained(folder / "model")

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(vocabulary), n_positions=32, n_embd=width, n_layer=2, n_head=2
        )
        GPT2LMHeadModel(config).save_pretrained(folder / "model")

    generator = random.Random(0)
    (folder / "sentences").mkdir()
    with (folder / "sentences" / "train.jsonl").open("w") as file:
        for _ in range(n_sentences):
            text = " ".join(generator.choices(WORDS, k=generator.randint(8, 20)))
            file.write(json.dumps({"text": text}) + "\n")
    return folder
