"""bench/peers.py: `transformers` and `peft` take train.py's steps, and they export what they trained."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_model import GEMMA, SMALL, make, random_ids
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

import data
import train
from bench import peers
from model import Transformer, add_experts, molf_layers

TOY = Path(__file__).parents[1] / "toy"
# 6 steps of 8 rows, each in several micro-batches
SHORT = ["--device", "cpu", "--data", "toy", "--limit", "48", "--batch-size", "8", "--max-tokens", "40",
         "--epochs", "1", "--log-every", "1", "--eval-limit", "2", "--seed", "3", "--export-dtype", "fp32",
         "--lr", "3e-4", "--lora-lr", "1e-3", "--ranks"]
WINDOW = dict(GEMMA, vocab_size=1024, pad_token_id=0, tie_word_embeddings=True)
MODELS = {"gemma tied": (Gemma3ForCausalLM, Gemma3TextConfig(**WINDOW)),
          "qwen untied": (Qwen2ForCausalLM, Qwen2Config(**SMALL | {"vocab_size": 1024},
                                                        tie_word_embeddings=False))}


def short(model, *ranks):
    """train.py's flags. fft has no ranks, and none are named."""
    flags = SHORT if ranks else SHORT[:-1]
    return [*flags, *map(str, ranks), "--model", str(model)]


@pytest.fixture(params=["toy", *MODELS])
def base(request, tmp_path):
    """The toy, or a random model with the toy's tokenizer."""
    if request.param == "toy":
        return "toy"
    torch.manual_seed(0)
    cls, config = MODELS[request.param]
    folder = tmp_path / "base"
    cls(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOY / name, folder / name)
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder):
    after = json.loads((folder / "results.json").read_text())["after"]
    return {name: x["value"] for name, x in after.items() if isinstance(x, dict)}


def refuse(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        peers.parse_args(list(map(str, argv)))
    assert e.value.code == 2
    return capsys.readouterr().err


def assert_same_run(theirs, ours, base, tolerance):
    """Loss and norm at every step, the metrics, and the weights, measured by how far they moved."""
    pairs = list(zip(log(theirs), log(ours), strict=True))
    assert len(pairs) == 6
    for t, o in pairs:
        assert t["loss"] == pytest.approx(o["loss"], rel=tolerance)
        assert t["grad_norm"] == pytest.approx(o["grad_norm"], rel=10 * tolerance)
        assert t["lr"] in o["lr"].values()
    begin = Transformer.from_pretrained(base, torch.float32).state_dict()
    a, b = weights(theirs), weights(ours)
    assert a.keys() == b.keys()
    moved = sum((b[name] - begin[name]).square().sum() for name in b).sqrt()
    apart = sum((b[name] - a[name]).square().sum() for name in b).sqrt()
    assert moved > 0 and apart < 1e-3 * moved
    assert metrics(theirs / "evaluation") == pytest.approx(metrics(ours))


def test_fft_takes_the_same_steps_as_train_py(base, tmp_path):
    peers.main(["--peer", "fft", "--", *short(base), "--out", str(tmp_path / "theirs")])
    train.main([*short(base), "--method", "fft", "--out", str(tmp_path / "ours")])
    assert_same_run(tmp_path / "theirs", tmp_path / "ours", base, 1e-5)


def test_lora_takes_the_same_steps_as_train_py_from_the_same_A(base, tmp_path, monkeypatch):
    load = peers.load

    def load_with_our_A(source, peer, a, steps):
        model = load(source, peer, a, steps)
        ours = Transformer.from_pretrained(source, torch.float32)
        torch.manual_seed(a.seed)
        add_experts(ours, a.ranks, a.alpha, full=False)
        for name, layer in molf_layers(ours):
            theirs = peers.inner(model).get_submodule(name)
            assert theirs.scaling["default"] == pytest.approx(layer.scales[0])
            theirs.lora_A["default"].weight.data.copy_(layer.A[0])
        return model
    monkeypatch.setattr(peers, "load", load_with_our_A)
    flags = [*short(base, 4), "--weight-decay", "7"]            # which LoRA does not have
    peers.main(["--peer", "lora", "--", *flags, "--out", str(tmp_path / "theirs")])
    train.main([*flags, "--method", "lora", "--out", str(tmp_path / "ours")])
    assert_same_run(tmp_path / "theirs", tmp_path / "ours", base, 1e-5)


@pytest.mark.parametrize("peer", ["lora", "dora", "adalora"])
def test_the_export_is_the_model_that_was_trained(peer, base, tmp_path, monkeypatch):
    ids = random_ids(2, 9)
    export, logits = peers.export, []

    def look(model, *args):
        with torch.no_grad():
            logits.append(model(ids).logits)
        export(model, *args)
    monkeypatch.setattr(peers, "export", look)
    out = tmp_path / "run"
    flags = [*short(base, 4), "--lora-lr", "0.02", "--dropout", "0.1", "--checkpointing"]
    peers.main(["--peer", peer, "--", *flags, "--out", str(out)])
    with torch.no_grad():
        exported = Transformer.from_pretrained(out / "model")(ids)
        before = Transformer.from_pretrained(base, torch.float32)(ids)
    torch.testing.assert_close(exported, logits[0], rtol=1e-4, atol=1e-4)
    assert (exported - before).abs().max() > 0.01
    assert metrics(out / "evaluation") and log(out)[-1]["step"] == 6
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / "model" / name).read_bytes() == (TOY / name).read_bytes()


def test_a_step_of_adalora_is_that_of_peft_and_its_budget_goes_down_to_the_rank(tmp_path, monkeypatch):
    """30 steps: 3 at 6 ranks a module, 6 at 4."""
    seen = []
    train_peer = peers.train_peer

    def look(model, peer, examples, a, log):
        assert model.base_model.rankallocator.init_bgt == 42 * 6
        a.max_tokens = 10 ** 6                                  # one micro-batch, as peft wants it
        batch = examples[:8]
        peers.backward(model, peer, batch, a)
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        ids, mask, *_ = peers.padded(batch, "cpu")
        labels = ids.masked_fill(mask == 0, -100)
        for row, e in enumerate(batch):
            labels[row, :e.n_prompt] = -100
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        model.zero_grad()
        train_peer(model, peer, examples, a, log)
        seen.append({name: p for name, p in model.named_parameters() if "lora_E" in name})
    monkeypatch.setattr(peers, "train_peer", look)
    out = tmp_path / "run"
    flags = [*short("toy", 4), "--epochs", "5", "--lora-lr", "0.02"]
    peers.main(["--peer", "adalora", "--", *flags, "--out", str(out)])
    left = [r["rank"] for r in log(out)]
    assert left[:4] == [6] * 4 and left[-6:] == [4] * 6
    assert left == sorted(left, reverse=True) and len(set(left)) > 10
    ranks = [(p != 0).sum().item() for p in seen[0].values()]
    assert len(ranks) == 42 and sum(ranks) == 42 * 4 and len(set(ranks)) > 1
    assert log(out)[-1]["loss"] < log(out)[0]["loss"]


def test_the_regulariser_counts_once_whatever_the_micro_batches(tmp_path):
    peer, a = peers.parse_args(["--peer", "adalora", "--", *short("toy", 4), "--out", str(tmp_path / "x")])
    examples = data_examples()
    model = peers.load(TOY, peer, a, steps=10)
    losses, gradients = [], []
    for a.max_tokens in (10 ** 6, 20):
        losses.append(peers.backward(model, peer, examples, a).item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def data_examples():
    tokenizer = data.Tokenizer.from_file(TOY)
    rows, _ = data.load_rows("fact", "train", "toy", limit=8)
    return [data.encode_row(tokenizer, data.TASKS["fact"], row) for row in rows]


def test_bf16_trains_fp32_weights(tmp_path):
    """On a CPU as on a GPU: what trains is fp32, and the frozen base is bf16."""
    for peer, base_dtype in (("fft", torch.float32), ("dora", torch.bfloat16)):
        ranks = [] if peer == "fft" else [4]
        flags = [*short("toy", *ranks), "--dtype", "bfloat16", "--out", str(tmp_path / peer)]
        _, a = peers.parse_args(["--peer", peer, "--", *flags])
        model = peers.load(TOY, peer, a, steps=10)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert peers.inner(model).get_input_embeddings().weight.dtype == base_dtype
        loss = peers.backward(model, peer, data_examples(), a)
        a.dtype = "float32"
        exact = peers.backward(peers.load(TOY, peer, a, steps=10), peer, data_examples(), a)
        assert loss.item() == pytest.approx(exact.item(), rel=0.01) and loss != exact


def test_decay_is_for_matrices(tmp_path):
    for peer, ranks, decay in (("fft", [], 0.1), ("dora", [4], 0.01)):
        flags = [*short("toy", *ranks), "--lora-lr", "0.5", "--out", str(tmp_path / peer)]
        _, a = peers.parse_args(["--peer", peer, "--", *flags])
        groups = peers.param_groups(peers.load(TOY, peer, a, steps=10), peer, a)
        dims = [group["params"][0].dim() for group in groups]
        # norms and the biases of q, k and v; or DoRA's lengths beside A and B
        assert (dims.count(1), dims.count(2)) == ((13 + 18, 43) if peer == "fft" else (42, 84))
        for group in groups:
            assert group["weight_decay"] == (decay if group["params"][0].dim() == 2 else 0)
            assert group["lr"] == (3e-4 if peer == "fft" else 0.5)


def test_overwrite_leaves_no_results_of_the_run_before(tmp_path, monkeypatch):
    argv = ["--peer", "fft", "--", *short("toy"), "--out", str(tmp_path / "run")]
    peers.main(argv)

    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(peers, "train_peer", stop)
    with pytest.raises(KeyboardInterrupt):
        peers.main([*argv, "--overwrite"])
    assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob("*.safetensors"))


def test_A_is_drawn_from_the_seed(tmp_path):
    def first_A(seed):
        flags = [*short("toy", 4), "--seed", seed, "--out", str(tmp_path / "run")]
        _, a = peers.parse_args(["--peer", "lora", "--", *flags])
        named = dict(peers.load(TOY, "lora", a, steps=10).named_parameters())
        return next(p for name, p in named.items() if "lora_A" in name)
    first = first_A("1")
    torch.rand(1)
    assert torch.equal(first, first_A("1")) and not torch.equal(first, first_A("2"))


def test_what_a_peer_cannot_do_is_refused(tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert "--out None: give a new directory" in refuse(capsys, "--peer", "lora", "--")
    assert f"--out {tmp_path}: give" in refuse(capsys, "--peer", "lora", "--", "--out", tmp_path)
    assert "--eval-every is not for" in refuse(capsys, "--peer", "lora", "--", "--eval-every", "5", *out)
    assert "one rank" in refuse(capsys, "--peer", "lora", "--", "--ranks", "4", "8", *out)
    assert "--rest" in refuse(capsys, "--peer", "dora", "--", "--rest", "train", *out)
    assert "invalid choice: 'molf'" in refuse(capsys, "--peer", "molf", "--", *out)
    assert "--method is not for" in refuse(capsys, "--peer", "lora", "--", "--method", "lora", *out)
    peer, a = peers.parse_args(["--peer", "adalora", "--", *map(str, out)])
    assert (peer, a.method, a.ranks) == ("adalora", "lora", [16])
