"""The four methods, and the controls that tell routing from the rest, over several seeds: a Markdown table.

    python bench/compare.py                                  # the toy world, seeds 1 2 3
    python bench/compare.py --seeds 1 -- --model DIR --data counterfact.json --limit 1000

Everything behind -- goes to train.py. Runs lie in --out, one directory each; a finished one is read, not run.
"""
import argparse
import contextlib
import hashlib
import io
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402

ROWS = {"fft": "--method fft", "lora": "--method lora", "lora, rest trained": "--method lora --rest train",
        "molf, rule epd": "--method molf", "molf, rule pfn": "--method molf --score pfn",
        "molf, rule snr": "--method molf --score snr", "molf, rule align": "--method molf --score align",
        "molf, a coin": "--method molf --score random", "molf-e": "--method molf-e"}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--out", type=Path, default=Path("runs/compare"))
    p.add_argument("--metrics", nargs="+", default=["ES", "PS", "NS"])
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args, rest = p.parse_args(argv[:cut]), argv[cut + 1:]
    print(f"| mean ± standard deviation of {len(args.seeds)} seeds | " + " | ".join(args.metrics)
          + " | steps won by the full expert |\n| --- |" + " --- |" * (len(args.metrics) + 1))
    for name, flags in ROWS.items():
        results, shares = [], []
        for seed in args.seeds:
            flags_hash = hashlib.sha256(" ".join(rest).encode()).hexdigest()[:6]
            out = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{flags_hash}"
            if not (out / "results.json").exists():
                with contextlib.redirect_stdout(io.StringIO()):
                    train.main([*flags.split(), "--seed", str(seed), "--out", str(out), *rest])
            results.append(json.loads((out / "results.json").read_text())["after"])
            log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            steps = [r["step"] - s["step"] for r, s in zip(log, [{"step": 0}, *log])]
            shares.append(sum(r["full_share"] * n for r, n in zip(log, steps)) / log[-1]["step"])
        cells = [[100 * r[m]["value"] for r in results] for m in args.metrics]
        spread = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in cells]
        share = f"{statistics.mean(shares):.0%}" if "molf," in name else ""
        values = [f"{statistics.mean(c):.1f} ± {s:.1f}" for c, s in zip(cells, spread)]
        print(f"| {name} | {' | '.join(values)} | {share} |", flush=True)


if __name__ == "__main__":
    main()
