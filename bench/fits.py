"""Which models fit on which GPUs, as a Markdown table: GB a GPU of a training step, by lib/memory.py.

    python bench/fits.py                                # all models, in a minute: no weights are made
    python bench/fits.py --models Qwen2.5-7B --tokens 4096

Columns are methods and numbers of GPUs. A cell has two numbers, without and with --checkpointing. **Bold**
fits a card of 80 GB, and *italic* one of 141 GB, of which 92 % can be used.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.speed import QWEN, SHAPES                        # noqa: E402
from lib.memory import USABLE, estimate_bytes                       # noqa: E402
from model import Config, Transformer, add_experts          # noqa: E402
from train import PAPER                                     # noqa: E402

LARGE = QWEN | dict(vocab_size=152064, tie_word_embeddings=False)
GEMMA = SHAPES["gemma-3-1b"] | dict(vocab_size=262208, sliding_window=1024, max_position_embeddings=131072)


def shape(family, hidden, intermediate, layers, heads, kv_heads, **more):
    return family | dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads) | more


MODELS = {
    "Qwen2.5-1.5B": SHAPES["qwen2.5-1.5b"],
    "Qwen2.5-3B": SHAPES["qwen2.5-3b"],
    "Qwen2.5-7B": shape(LARGE, 3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": shape(LARGE, 5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": shape(LARGE, 5120, 27648, 64, 40, 8),
    "Qwen2.5-72B": shape(LARGE, 8192, 29568, 80, 64, 8),
    "Gemma-3-1B": SHAPES["gemma-3-1b"],
    "Gemma-3-4B": shape(GEMMA, 2560, 10240, 34, 8, 4),
    "Gemma-3-12B": shape(GEMMA, 3840, 15360, 48, 16, 8),
    "Gemma-3-27B": shape(GEMMA, 5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168)}


def marked(gb):
    if gb <= 80 * USABLE:
        return f"**{gb:.0f}**"
    return f"*{gb:.0f}*" if gb <= 141 * USABLE else f"{gb:.0f}"


def cells(name, method, a):
    with torch.device("meta"):
        model = Transformer(Config.from_dict(MODELS[name])).to(torch.bfloat16)
    add_experts(model, PAPER["ranks"][method], full=method in ("fft", "molf"))
    flags = argparse.Namespace(device="cuda", eager=False)
    for n in a.gpus:
        gb = []
        for model.checkpointing in (False, True):
            gb.append(estimate_bytes(model, flags, a.tokens, n)["peak (estimate)"] / 1e9)
        yield " ".join(map(marked, gb))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    p.add_argument("--methods", nargs="+", default=["molf", "lora"], choices=PAPER["ranks"])
    p.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    p.add_argument("--tokens", type=int, default=8192, help="in a micro-batch of a GPU (default: 8192)")
    a = p.parse_args()
    heads = [f"{method}, {n}" for method in a.methods for n in a.gpus]
    print("| | " + " | ".join(heads) + " |\n| --- |" + " --- |" * len(heads))
    for name in a.models:
        row = [cell for method in a.methods for cell in cells(name, method, a)]
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
