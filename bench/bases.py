"""A base of a known model's exact shape with random weights, on which neither speed nor memory depends.

python bench/bases.py FOLDER [--shape Llama-3.1-8B] [--tokenizer FOLDER]
"""

import argparse
from pathlib import Path

import torch

from medlora.model.plan import SHAPES

KNOWN = {shape.name: shape for shape in SHAPES}
DEFAULT = "Llama-2-7B"


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=KNOWN, default=DEFAULT, help=f"of a base that is made, else {DEFAULT}")


def build_base(folder: Path, shape: str = DEFAULT, tokenizer: Path | None = None, *, tiny: bool = False) -> None:
    """Random weights in bfloat16, saved; `tiny`: few of them, with the shape's ratios of heads and its vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    known = KNOWN[shape]
    hidden, heads = (64, 4) if tiny else (known.hidden, known.heads)
    config = LlamaConfig(
        vocab_size=known.vocab,
        hidden_size=hidden,
        intermediate_size=known.intermediate * hidden // known.hidden // 8 * 8,
        num_hidden_layers=2 if tiny else known.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, known.kv_heads * heads // known.heads),
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=known.tied,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if tiny else "cuda"):
        LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    if tokenizer:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tiny", action="store_true")
    add_shape(parser)
    arguments = parser.parse_args()
    build_base(arguments.folder, arguments.shape, arguments.tokenizer, tiny=arguments.tiny)
