"""The model against `transformers`, the experts against plain autograd, checkpoints, and bad input."""
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM,
                          Gemma3ForConditionalGeneration, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM)

from model import Config, MoLFLinear, Packed, RMSNorm, Transformer, add_experts, fold, unfold

SMALL = dict(vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
GEMMA = dict(SMALL, head_dim=16, sliding_window=5, query_pre_attn_scalar=24, pad_token_id=0, bos_token_id=2,
             eos_token_id=1, layer_types=["sliding_attention", "sliding_attention", "full_attention",
                                          "sliding_attention"])
FAMILIES = {
    "qwen tied": (Qwen2ForCausalLM, Qwen2Config(**SMALL, tie_word_embeddings=True, rms_norm_eps=1e-5,
                                                rope_parameters={"rope_theta": 5e4, "rope_type": "default"})),
    "qwen untied": (Qwen2ForCausalLM, Qwen2Config(**SMALL, tie_word_embeddings=False)),
    "qwen sliding": (Qwen2ForCausalLM, Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5,
                                                   max_window_layers=2)),
    "gemma tied": (Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA)),
    "gemma untied": (Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA, tie_word_embeddings=False)),
    "gemma scaled": (Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA, rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})),
}


def make(family, path, seed=0):
    """A transformers model with every parameter random (biases and norms too), saved at `path`."""
    torch.manual_seed(seed)
    cls, config = FAMILIES[family]
    reference = cls(config).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(std=0.2)
    reference.save_pretrained(path)
    return reference


def multimodal(path):
    """A Gemma-3 with a vision tower, saved at `path`."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                  image_size=28, patch_size=14)
    text = {k: v for k, v in GEMMA.items() if k != "vocab_size"}
    config = Gemma3Config(text_config=dict(text, vocab_size=120), vision_config=vision, mm_tokens_per_image=4,
                          image_token_index=110, boi_token_index=111, eoi_token_index=112)
    torch.manual_seed(0)
    both = Gemma3ForConditionalGeneration(config).eval()
    both.save_pretrained(path)
    return both


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def random_ids(*shape, seed=1):
    return torch.randint(3, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(FAMILIES))
def pair(request, tmp_path):
    reference = make(request.param, tmp_path)
    return reference, Transformer.from_pretrained(tmp_path)


@torch.no_grad()
def test_logits_equal_transformers_beyond_the_sliding_window(pair):
    reference, ours = pair
    ids = random_ids(3, 23)
    close(ours(ids), reference(ids).logits)


@torch.no_grad()
def test_packed_sequences_equal_one_by_one(pair):
    reference, ours = pair
    rows = [random_ids(1, n, seed=n) for n in (1, 17, 4, 9)]
    packed = ours.logits(ours.hidden(torch.cat(rows, 1)[0], Packed([r.shape[1] for r in rows])))
    close(packed, torch.cat([reference(r).logits[0] for r in rows]))


@torch.no_grad()
def test_cached_generation_equals_transformers_on_unequal_prompts(pair):
    reference, ours = pair
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 11, 7, 1)]       # windows are 5 wide
    new = ours.generate(prompts, 12)
    for prompt, got in zip(prompts, new):
        ids = torch.tensor([prompt])
        want = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)
        assert got == want[0, len(prompt):].tolist()


@torch.no_grad()
def test_generation_stops_at_eos_and_samples_from_the_softmax(pair):
    _, ours = pair
    prompt = random_ids(6).tolist()
    (free,) = ours.generate([prompt], 10)
    (stopped,) = ours.generate([prompt], 10, eos_ids=[free[3]])
    assert stopped == free[:free.index(free[3]) + 1]
    logits = ours(torch.tensor([prompt]))[0, -1]
    draws = ours.generate([prompt] * 4000, 1, temperature=2.0, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(torch.tensor(draws)[:, 0], minlength=len(logits)) / 4000
    assert (share - (logits / 2).softmax(-1)).abs().max() < 0.04            # 5 standard deviations
    with pytest.raises(ValueError, match="at least one token"):
        ours.generate([[]], 1)


def test_gradients_equal_transformers(pair):
    reference, ours = pair
    ids = random_ids(2, 12)
    reference(ids, labels=ids).loss.backward()
    where = torch.cat([torch.arange(11), torch.arange(12, 23)])
    (ours.loss(ids.flatten(), Packed([12, 12]), where, ids[:, 1:].flatten()) / 22).backward()
    theirs = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        close(p.grad, theirs[name].grad)


def test_loss_in_chunks_with_checkpointing_equals_one_piece(pair, monkeypatch):
    _, ours = pair
    ids, layout, where = random_ids(40), Packed([25, 15]), torch.arange(3, 24)
    whole = ours.loss(ids, layout, where, ids[where + 1])
    whole.backward()
    grads = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    monkeypatch.setattr("model.LOGIT_ROWS", 4)
    ours.checkpointing = True
    pieces = ours.loss(ids, layout, where, ids[where + 1])
    pieces.backward()
    close(pieces, whole, 1e-5)
    for n, p in ours.named_parameters():
        close(p.grad, grads[n], 1e-5)


def test_gelu_is_the_tanh_form_and_norms_multiply_in_their_family_order():
    x = torch.linspace(-3, 3, 101)
    config = Config.from_dict(FAMILIES["gemma tied"][1].to_dict())
    mlp = Transformer(config).model["layers"][0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):      # identity on the first 64 of 80 channels
        torch.nn.init.eye_(linear.weight)
    row = torch.nn.functional.pad(x[:64], (0, 0))[None]
    by_hand = 0.5 * row * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (row + 0.044715 * row ** 3))) * row
    close(mlp(row), by_hand, 1e-6)
    assert (mlp(row) - torch.nn.functional.gelu(row) * row).abs().max() > 1e-4
    half = torch.tensor([[3.0, 4.0, 5.0, 6.0]], dtype=torch.bfloat16)
    for gemma in (True, False):
        norm = RMSNorm(4, 0.0, gemma).to(torch.bfloat16)
        torch.nn.init.constant_(norm.weight, 0.3)
        y, w = half.double() / half.double().square().mean().sqrt(), norm.weight.double()
        want = y * (1 + w) if gemma else y.to(torch.bfloat16).double() * w
        assert torch.equal(norm(half), want.to(torch.bfloat16))


def test_gemma_embedding_scale_is_rounded_to_the_weights_dtype(tmp_path):
    reference = make("gemma tied", tmp_path).to(torch.bfloat16)
    ours = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    seen = []
    ours.model["layers"][0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ids = random_ids(1, 8)
    with torch.no_grad():
        ours(ids)
    assert torch.equal(seen[0], reference.model.embed_tokens(ids)[0])


# ---------------------------------------------------------------------------------------------- configuration

def test_old_and_new_spellings_of_a_config_are_one():
    new = Gemma3TextConfig(**dict(GEMMA, num_hidden_layers=7, layer_types=None),
                           sliding_window_pattern=6).to_dict()
    new["rope_parameters"] = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    new["dtype"] = "bfloat16"
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    old |= dict(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0},
                sliding_window_pattern=6, torch_dtype="bfloat16")
    old.pop("_sliding_window_pattern")
    a, b = Config.from_dict(new), Config.from_dict(old)
    a.raw = b.raw = None
    assert a == b and a.layer_types.count("full_attention") == 1 and a.dtype == torch.bfloat16
    assert a.rope == {"full_attention": (1e6, 8.0), "sliding_attention": (1e4, 1.0)}
    qwen = Config.from_dict({**SMALL, "model_type": "qwen2", "rope_theta": 1e6})
    assert qwen.rope == {"full_attention": (1e6, 1.0)} and not qwen.tie_word_embeddings


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "'llama' is not supported: qwen2 .* and gemma3_text"),
    (dict(hidden_act="gelu"), "activation 'gelu'"),
    (dict(rope_scaling={"type": "yarn", "factor": 4}), "rope scaling 'yarn'"),
    (dict(vocab_size=None), "lacks vocab_size"), (dict(num_attention_heads=0), "config.json"),
    (dict(torch_dtype="auto"), "auto"),
])
def test_configs_that_cannot_be_run_are_refused_by_name(change, message, tmp_path):
    raw = {**SMALL, "model_type": "qwen2", **change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as e:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(e.value)


# ------------------------------------------------------------------------------------------------ checkpoints

@pytest.mark.parametrize("full, dropout", [(True, 0.0), (True, 0.1), (False, 0.0)])
def test_saved_model_loads_in_transformers_with_our_logits(pair, tmp_path, full, dropout):
    _, ours = pair
    for layer in add_experts(ours, ranks=(2, 3), full=full, dropout=dropout):
        for b in layer.B:
            torch.nn.init.normal_(b, std=0.05)
    fold(ours)
    ours.eval().save_pretrained(tmp_path / "out")
    reference, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32,
                                                           output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) \
        != ours.config.tie_word_embeddings
    ids = random_ids(2, 14)
    with torch.no_grad():
        close(reference(ids).logits, ours(ids))
        close(Transformer.from_pretrained(tmp_path / "out")(ids), ours(ids))


def test_multimodal_gemma_gives_its_text_part(tmp_path):
    both = multimodal(tmp_path)
    ids = random_ids(2, 14)
    with torch.no_grad():
        want = both(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
        close(Transformer.from_pretrained(tmp_path)(ids), want)
        saved = load_file(tmp_path / "model.safetensors")               # the other spelling of the prefix
        swap = {"language_model.model.": "model.language_model.",
                "model.language_model.": "language_model.model."}
        source = next(k for k in swap if any(n.startswith(k) for n in saved))
        save_file({n.replace(source, swap[source]): t for n, t in saved.items()},
                  tmp_path / "model.safetensors")
        close(Transformer.from_pretrained(tmp_path)(ids), want)


def test_the_adapter_of_a_multimodal_gemma_works_in_peft(tmp_path):
    multimodal(tmp_path / "base")
    ours = Transformer.from_pretrained(tmp_path / "base", torch.float32)
    for layer in add_experts(ours, ranks=(2, 3), full=False):
        for b in layer.B:
            torch.nn.init.normal_(b, std=0.5)
    ours.save_adapter(tmp_path / "adapter", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    ids = random_ids(2, 14)
    types = torch.zeros_like(ids)
    with torch.no_grad():
        before = base(input_ids=ids, token_type_ids=types).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
        after = theirs(input_ids=ids, token_type_ids=types).logits
        close(after, ours(ids))
    assert (after - before).abs().max() > 0.01
    assert not any("vision" in name for name, _ in theirs.named_modules() if "lora_A" in name)


def test_sharded_checkpoints(tmp_path):
    reference = make("qwen untied", tmp_path / "a")
    reference.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    ids = random_ids(1, 9)
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path / "b")
        close(ours(ids), reference(ids).logits)
        ours.model["norm"].weight.mul_(2)
        ours.save_pretrained(tmp_path / "b")                            # whose shards must not win over it
        close(Transformer.from_pretrained(tmp_path / "b")(ids), ours(ids))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
        close(theirs(ids).logits, ours(ids))


def edited(change):
    def apply(path):
        state = load_file(path / "model.safetensors")
        change(state)
        save_file(state, path / "model.safetensors")
    return apply


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:len(data) // 2])


Q = "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize("damage, message", [
    (edited(lambda s: s.pop(Q)), f"1 missing tensors: {Q}"),
    (edited(lambda s: s.update({"model.extra": torch.ones(2)})), "unexpected tensors: model.extra"),
    (edited(lambda s: s.update({Q: torch.ones(7)})), rf"wrong shapes: {Q} is \[7\], not \[64\]"),
    (truncate, "model.safetensors is not a whole safetensors file"),
    (edited(lambda s: s[Q].fill_(float("nan"))), f"{Q} holds NaN or infinite numbers"),
    (edited(lambda s: s.update({Q: torch.full_like(s[Q], float("inf"))})), f"{Q} holds NaN or infinite"),
    (edited(lambda s: s.update({Q: s[Q].to(torch.int8)})), f"{Q} is stored as I8: quantised weights"),
    (edited(lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)})), "stored as F8_E4M3: quantised weights"),
    (edited(lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1})),
     "lm_head.weight differs from the embedding, although tied"),
    (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda path: (path / "config.json").unlink(), "config.json is missing"),
    (lambda path: (path / "config.json").write_text("{"), "config.json"),
])
def test_damaged_checkpoints_are_refused_by_name(damage, message, tmp_path):
    make("qwen tied", tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        Transformer.from_pretrained(tmp_path)


def test_a_copy_of_the_embedding_is_no_trouble_and_an_old_adapter_stays_behind(tmp_path):
    reference = make("qwen tied", tmp_path / "a")
    edited(lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 5}')
    ours = Transformer.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "adapter_config.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert theirs.generation_config.eos_token_id == 5
    ids = random_ids(1, 9)
    with torch.no_grad():
        close(theirs(ids).logits, reference(ids).logits)


def test_gemma_refuses_fp16(tmp_path):
    make("gemma tied", tmp_path)
    with pytest.raises(ValueError, match="overflow fp16: use bfloat16 or float32"):
        Transformer.from_pretrained(tmp_path, dtype=torch.float16)


# ---------------------------------------------------------------------------------------------------- experts

def test_two_path_lora_equals_peft(tmp_path):
    """Same formula, initial distribution and gradients as PEFT's rsLoRA on the same base."""
    reference = make("qwen tied", tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    layers = add_experts(ours, ranks=(4,), alpha=6, full=False)
    peft = get_peft_model(reference, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
    mine = {n: m for n, m in ours.named_modules() if isinstance(m, MoLFLinear)}
    bound = max(a.abs().max() * a.shape[1] ** 0.5 for layer in layers for a in layer.A)
    assert 0.99 < bound <= 1                                            # A ~ U(-1/sqrt(in), 1/sqrt(in))
    theirs = dict(peft.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in mine.items():
            torch.nn.init.normal_(layer.B[0], std=0.1)
            theirs[name].lora_A["default"].weight.copy_(layer.A[0])
            theirs[name].lora_B["default"].weight.copy_(layer.B[0])
    ids = random_ids(2, 10)
    logits = ours(ids)
    close(logits, peft(ids).logits)
    logits.square().sum().backward()
    peft(ids).logits.square().sum().backward()
    for name, layer in mine.items():
        assert layer.weight.grad is None                                # frozen: no full-size gradient exists
        for p, q in ((layer.A[0], theirs[name].lora_A), (layer.B[0], theirs[name].lora_B)):
            torch.testing.assert_close(p.grad, q["default"].weight.grad, rtol=1e-3, atol=1e-3)


def test_unfolded_gradients_equal_autograd_through_the_sum_of_experts():
    """In float64: dL/dW = G, dL/dB = s G A', dL/dA = s B' G, for several experts at once."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(5, 7)}).double()
    (layer,) = add_experts(net, ranks=(2, 3), alpha=4)
    for p in layer.parameters():
        p.data = p.data.double()
    for b in layer.B:
        torch.nn.init.normal_(b)
    fold(net)
    leaves = [p.detach().clone().requires_grad_() for p in (layer.full, *layer.A, *layer.B)]
    w, a1, a2, b1, b2 = leaves
    effective = w + 4 / 2 ** 0.5 * b1 @ a1 + 4 / 3 ** 0.5 * b2 @ a2
    torch.testing.assert_close(layer.weight, effective, rtol=1e-13, atol=1e-13)
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.tanh(torch.nn.functional.linear(x, effective, layer.bias)).square().sum().backward()
    torch.tanh(net["q_proj"](x)).square().sum().backward()
    unfold(net)
    assert layer.weight.grad is None
    for p, leaf in zip((layer.full, *layer.A, *layer.B), leaves):
        torch.testing.assert_close(p.grad, leaf.grad, rtol=1e-12, atol=1e-12)


def test_bf16_folding_keeps_fp32_masters_and_exports_the_training_weights_bit_for_bit(tmp_path):
    make("qwen tied", tmp_path)
    ours = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layers = add_experts(ours, ranks=(2,))
    for layer in layers:
        torch.nn.init.normal_(layer.B[0], std=0.01)
        layer.full.data += 1e-4 * torch.randn_like(layer.full)          # far below bf16's spacing
    fold(ours)
    ids = random_ids(12)
    ours.loss(ids, Packed([12]), torch.arange(11), ids[1:]).backward()
    unfold(ours)
    for layer in layers:
        assert layer.full.dtype == torch.float32 and layer.full.grad.dtype == torch.bfloat16
        want = layer.full + layer.scales[0] * layer.B[0] @ layer.A[0]
        assert (layer.weight.float() - want).abs().max() <= want.abs().max() * 2 ** -8
    ours.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        for name, m in ours.named_modules():
            if isinstance(m, MoLFLinear):
                assert torch.equal(f.get_tensor(f"{name}.weight"), m.weight)


def test_add_experts_refuses_what_makes_no_sense_and_freezes_what_it_should(tmp_path):
    make("qwen tied", tmp_path)
    for bad in (dict(ranks=(0,)), dict(ranks=(), full=False), dict(targets=("nothing",))):
        with pytest.raises(ValueError):
            add_experts(Transformer.from_pretrained(tmp_path), **bad)
    twice = Transformer.from_pretrained(tmp_path)
    add_experts(twice)
    with pytest.raises(ValueError, match="experts already"):
        add_experts(twice)
    for full, rest in ((True, None), (False, None), (True, False), (False, True)):
        model = Transformer.from_pretrained(tmp_path)
        layers = add_experts(model, ranks=(2,), full=full, train_rest=rest)
        assert model.model["embed_tokens"].weight.requires_grad == (full if rest is None else rest)
        assert all(layer.weight.requires_grad == full for layer in layers) and len(layers) == 7 * 4


# -------------------------------------------------------------------------------------------- where a GPU is

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["qwen tied", "gemma tied"])
def test_variable_length_attention_on_a_gpu_equals_the_masked_one(family, tmp_path):
    """bf16 on the GPU, whose attention takes packed rows, against fp32 on a CPU: loss, gradients, tokens."""
    make(family, tmp_path)
    lengths = [1, 17, 4, 30]
    ids, where = random_ids(sum(lengths)), torch.tensor([2, 5, 12, 20, 24, 40, 50])
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16), ("cuda", torch.float32)):
        model = Transformer.from_pretrained(tmp_path, dtype=dtype, device=device)
        add_experts(model, ranks=(4,))
        x, w = ids.to(device), where.to(device)
        loss = model.loss(x, Packed(lengths, device), w, x[w + 1])
        loss.backward()
        unfold(model)
        grads = [m.full.grad.float().cpu() for m in model.modules() if isinstance(m, MoLFLinear)]
        new = model.generate([ids[:5].tolist(), ids[5:14].tolist()], 40, eos_ids=[96])
        results.append((loss.item(), torch.cat([g.flatten() for g in grads]), new))
    (want, g, new), low, high = results
    assert abs(high[0] - want) < 1e-3 and high[2] == new
    assert abs(low[0] - want) < 0.03 * want
    assert torch.cosine_similarity(low[1], g, dim=0) > 0.98
    assert torch.cosine_similarity(high[1], g, dim=0) > 0.9999


# -------------------------------------------------------------------------- real checkpoints (pytest -m real)

@pytest.mark.real
@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3-270m", "smollm2-135m-qwen2"])
def test_greedy_text_of_real_checkpoints_equals_transformers(name):
    """A batch of unequal prompts, one longer than Gemma's window of 512."""
    from test_data import GPL, PROSE
    from data import Tokenizer, encode_prompt
    directory = Path(os.environ["MOLF_REAL"]) / name
    ours, tokenizer = Transformer.from_pretrained(directory, torch.float32), Tokenizer.from_file(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = [encode_prompt(tokenizer, text) for text in ("The capital of France is", PROSE, GPL[:2600])]
    assert len(prompts[2]) > 530
    for prompt, got in zip(prompts, ours.generate(prompts, 24)):
        ids = torch.tensor([prompt])
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
        assert got == want[0, len(prompt):].tolist()


@pytest.mark.real
@pytest.mark.parametrize("name, dtype, prose, gpl", [
    ("gemma3-270m", torch.float32, 3.0407, 2.7375), ("gemma3-270m", torch.bfloat16, 3.0457, 2.7372),
    ("smollm2-135m-qwen2", torch.float32, 3.4129, 2.9496)])
def test_reference_losses_of_real_checkpoints(name, dtype, prose, gpl):
    from test_data import GPL, PROSE
    from data import Tokenizer
    directory = Path(os.environ["MOLF_REAL"]) / name
    model, tokenizer = Transformer.from_pretrained(directory, dtype=dtype), Tokenizer.from_file(directory)
    for text, want in ((PROSE, prose), (GPL, gpl)):
        ids = torch.tensor([tokenizer.bos_id] * (tokenizer.bos_id is not None) + tokenizer.encode(text))
        with torch.no_grad():
            loss = model.loss(ids, Packed([len(ids)]), torch.arange(len(ids) - 1), ids[1:]) / (len(ids) - 1)
        # In bf16 the two attentions of transformers 5.23 differ by 0.0045 on the first text.
        assert abs(loss.item() - want) < (1e-3 if dtype == torch.float32 else 1.5e-2)
