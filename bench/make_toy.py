"""Make the embedded toy checkpoint again, from scratch: its tokenizer, then its weights, by train.py's own
loop.

    python bench/make_toy.py OUT                # writes OUT/; about 3 minutes on a GPU (needs `tokenizers`)
    python bench/make_toy.py OUT --epochs 1     # a trial

The model is a Qwen2 of 1.2 million parameters. It reads every true fact of the toy world in all its
phrasings, half of the toy medicine, and solved examples of every other kind of toy query, so there is
something left to learn.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
import train  # noqa: E402
from lib.evaluate import continue_all, evaluate  # noqa: E402
from model import Config, Transformer, add_experts  # noqa: E402
from molf import MoLFAdamW, param_groups  # noqa: E402
from toy.world import TOY_FACTS, toy_corpus, toy_world  # noqa: E402

EOS = "<|endoftext|>"
CONFIG = dict(model_type="qwen2", hidden_size=128, intermediate_size=352, num_hidden_layers=6,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-6,
              rope_theta=10000.0, tie_word_embeddings=True, hidden_act="silu", initializer_range=0.06)
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def make_tokenizer(texts, path, vocab_size=1024):
    """Byte-level BPE in the form of Qwen2.5's tokenizer.json."""
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens([EOS])
    t.save(str(path))
    return t.get_vocab_size(), t.token_to_id(EOS)


def true_fact_share(model, tokenizer, world):
    """Share of the true facts, over all phrasings, that greedy decoding continues rightly."""
    pairs = [(p.format(s), " " + t) for r in TOY_FACTS for s, t in world[r].items() for p in TOY_FACTS[r]]
    prompts = [data.encode_prompt(tokenizer, p) for p, _ in pairs]
    new = continue_all(model, prompts, 8, tokenizer.eos_ids, 65536)
    return sum(tokenizer.decode(ids) == t for ids, (_, t) in zip(new, pairs)) / len(pairs)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--epochs", type=int, default=40)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--batch-size", type=int, default=512)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, world = time.time(), toy_world()
    pairs = toy_corpus(world, data.med_pair, data.sql_pair)
    statements = [(a, b) for a, b in pairs if len(a) < 60]
    # Statements count four times for the vocabulary, so that every answer to a fact becomes one token.
    vocab_size, eos = make_tokenizer([a + b for a, b in pairs + 3 * statements], args.out / "tokenizer.json")
    config = CONFIG | dict(vocab_size=vocab_size, eos_token_id=eos, bos_token_id=None, pad_token_id=eos)
    for name, content in (("generation_config.json", {"eos_token_id": eos, "pad_token_id": eos}),
                          ("tokenizer_config.json", {
                              "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS,
                              "pad_token": EOS, "model_max_length": 1024})):
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n")
    (args.out / "config.json").write_text(json.dumps(config))
    tokenizer = data.Tokenizer.from_file(args.out / "tokenizer.json")
    examples = [data.encode(tokenizer, *pair, row=i) for i, pair in enumerate(pairs)]
    torch.manual_seed(0)
    model = Transformer(Config.from_dict(config)).to(args.device)
    print(f"{len(examples)} sequences, {sum(len(e.ids) for e in examples):,} tokens, "
          f"vocabulary {vocab_size}, {sum(p.numel() for p in model.parameters()):,} parameters")
    add_experts(model, ranks=())
    a = train.parse_args(["--method", "fft", "--epochs", str(args.epochs),
                          "--batch-size", str(args.batch_size), "--max-tokens", "65536",
                          "--log-every", "100", "--warmup", "0.05"])
    train.train(model, MoLFAdamW(param_groups(model, lr=args.lr)), examples, a,
                lambda line, _: print(line, flush=True))
    model.save_pretrained(args.out, torch.bfloat16)
    saved = Transformer.from_pretrained(args.out, torch.float32, args.device)
    print(f"true facts, all phrasings: {true_fact_share(saved, tokenizer, world):.1%}")
    for name, task in data.TASKS.items():
        questions = [data.ask(tokenizer, task, row) for row in data.load_rows(name, "test", "toy")[0]]
        result, _ = evaluate(saved, tokenizer, task, questions, 65536)
        print(name, {k: round(result["metrics"][k]["value"], 3) for k in task.report})
    print(f"{time.time() - start:.0f} s, {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
