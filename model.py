"""Qwen2.5 and Gemma-3 text models from scratch, with MoLF's experts built into every linear layer.

    python model.py toy "Tamo Veril was born in"         # continue a prompt, greedily
    python model.py toy "Tamo Veril was born in" 0.8     # ... at temperature 0.8

Every target linear holds a list of experts, and its forward pass uses the sum of all (arXiv 2605.07111):

    W_eff = W + sum_i s_i B_i A_i        s_i = alpha / sqrt(r_i)   (rsLoRA, arXiv 2312.03732)

Where the full expert W trains beside others (without dropout), the layer is folded. Its weight is W_eff, so
it runs as fast as a plain linear, and the one gradient G = dL/dW_eff gives the gradient of every expert.

    loss.backward()          # G, in weight.grad
    unfold(model)            # dL/dW = G    dL/dB = s G A^T    dL/dA = s B^T G
    optimizer.step()         # moves W, or A and B
    optimizer.zero_grad()
    fold(model)              # weight <- W + sum s B A, in the weight's dtype

The model runs on one row of N tokens, in which the sequences of a batch stand end to end. Names of modules
and parameters are Hugging Face's, so loading and saving need no table of names. References: Qwen2.5 (arXiv
2412.15115), Gemma 3 (arXiv 2503.19786), RoPE (arXiv 2104.09864).
"""
import inspect
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from lib.config import parse_config, peft_names
from lib.files import (copy_companions, find_checkpoint, refuse_infinite, refuse_quantised, save_safely,
                       save_weights, weight_files)
from lib.progress import progress
from lib.ranks import in_step, whole_groups
from lib.read import naming, one_line, read_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOGIT_ROWS = 2048       # rows of logits in one piece of the loss: 2048 x 262k (Gemma) in fp32 is 2 GiB
# torch 2.11 shares key heads among query heads unasked; later versions want to be told
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# ------------------------------------------------------------------------------------------------------------
# configuration

@dataclass
class Config:
    gemma: bool                     # Gemma-3's blocks, or else Qwen2's
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int                   # in Gemma not hidden_size / heads
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    softmax_scale: float
    layer_types: list               # "full_attention" or "sliding_attention", one a layer
    sliding_window: int             # a token of a sliding layer sees itself and window - 1 before it
    rope: dict                      # layer type -> (theta, factor): angle = pos / factor / theta^(2i/D)
    dtype: torch.dtype              # of the stored weights
    raw: dict                       # config.json of the text model, to be written back

    @classmethod
    def from_dict(cls, raw):
        """From a parsed config.json, in its old or new spelling. ValueError for what is not built here."""
        return cls(**parse_config(raw))

# ------------------------------------------------------------------------------------------------------------
# Who attends to whom. A layout has pos (N,), the position of each token in its sequence, and
# attend(q, k, v, layer). It is a Packed row, or a KVCache while text is generated.

def on_device(x, device):
    """A copy of a CPU tensor that the host does not wait for."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)

class Packed:
    """S sequences end to end in one row of N tokens. A token sees its own sequence, up to itself. `lengths`
    are those of the sequences; some may be 0. max_len is the longest, or more."""

    def __init__(self, lengths, device="cpu", max_len=None):
        n = torch.tensor(lengths)               # (S,) on the CPU: on a GPU repeat_interleave would be a sync
        cu_seqlens = F.pad(n.cumsum(0), (1, 0))
        seq = torch.repeat_interleave(torch.arange(len(n)), n)
        pos = torch.arange(len(seq)) - cu_seqlens[seq]
        self.max_len = max_len or max(lengths)
        self.cu_seqlens = on_device(cu_seqlens.int(), device)       # (S + 1,): where each sequence begins
        self.seq = on_device(seq, device)                           # (N,): the sequence of each token
        self.pos = on_device(pos, device)                           # (N,): its position there

    def attend(self, q, k, v, layer):
        """q (N, H, D), k and v (N, Hkv, D) -> (N, H, D). `layer`, an Attention, has scale and window."""
        scale, window = layer.scale, layer.window
        if q.is_cuda and q.dtype != torch.float32:
            back = window - 1 if window else -1
            return varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_len, self.max_len,
                               scale=scale, window_size=(back, 0), **GQA)
        # In fp32 or on a CPU gather into (S, L). The columns after a sequence's end hold other tokens. They
        # are dropped from the result, and no token before them sees them, because the mask is causal.
        L = self.max_len
        index = self.cu_seqlens[:-1, None] + torch.arange(L, device=q.device)               # (S, L)
        index = index.clamp_max(len(q) - 1)
        q, k, v = (t[index].transpose(1, 2) for t in (q, k, v))                             # (S, H, L, D)
        if 0 < window < L:
            i = torch.arange(L, device=q.device)
            mask = (i[:, None] >= i) & (i[:, None] - i < window)                            # (L, L)
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return y.transpose(1, 2)[self.seq, self.pos]

class KVCache:
    """Keys and values of B sequences of any lengths. First come their packed prompts, then one token each."""

    def __init__(self, c, lengths, max_len, dtype, device):
        shape = (c.num_hidden_layers, 2, len(lengths), c.num_key_value_heads, max_len, c.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.prompts = Packed(lengths, device)
        self.seq = self.prompts.seq
        self.pos = self.prompts.pos

    def begin_decoding(self):
        """From here on there is one token a sequence, at the position behind its prompt."""
        self.pos = self.prompts.cu_seqlens.diff().long()                                    # (B,)
        self.seq = torch.arange(len(self.pos), device=self.pos.device)
        self.prompts = None

    def attend(self, q, k, v, layer):
        keys, values = self.kv[layer.index]                                                 # (B, Hkv, T, D)
        keys[self.seq, :, self.pos] = k
        values[self.seq, :, self.pos] = v
        if self.prompts is not None:
            return self.prompts.attend(q, k, v, layer)
        t = torch.arange(keys.shape[2], device=q.device)
        pos = self.pos[:, None]
        mask = t <= pos                                                                     # (B, T)
        if layer.window:
            mask &= t > pos - layer.window
        # Query heads that share a key head become that head's queries: keys and values need no copies.
        q = q.unflatten(1, (keys.shape[1], -1))                                         # (B, Hkv, H/Hkv, D)
        y = F.scaled_dot_product_attention(q, keys, values, mask[:, None, None], scale=layer.scale)
        return y.flatten(1, 2)

# ------------------------------------------------------------------------------------------------------------
# the model

class RMSNorm(nn.Module):
    """In fp32. Gemma multiplies by (1 + w) and then rounds; Qwen rounds and then multiplies by w."""

    def __init__(self, dim, eps, gemma):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if gemma else torch.ones(dim))
        self.eps = eps
        self.gemma = gemma

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.gemma:
            return (y * (1 + self.weight.float())).to(x.dtype)
        return self.weight * y.to(x.dtype)

def rotate(x, cos, sin):
    """RoPE on x (N, heads, D). Pairs are (i, i + D/2), Hugging Face's order. cos and sin are (N, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

class Attention(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        bias = c.raw.get("attention_bias", not c.gemma)         # Qwen2 has biases on q, k and v, none on o
        q_width = c.num_attention_heads * c.head_dim
        kv_width = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_width, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, c.hidden_size, bias=bias and c.gemma)
        if c.gemma:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, True)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, True)
        self.index = index
        self.head_dim = c.head_dim
        self.scale = c.softmax_scale
        self.gemma = c.gemma
        self.window = c.sliding_window if c.layer_types[index] == "sliding_attention" else 0    # 0: none

    def forward(self, x, cos_sin, layout):
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)                 # (N, H, D)
        k = self.k_proj(x).unflatten(-1, heads)                 # (N, Hkv, D)
        v = self.v_proj(x).unflatten(-1, heads)
        if self.gemma:
            q = self.q_norm(q)
            k = self.k_norm(k)
        y = layout.attend(rotate(q, *cos_sin), rotate(k, *cos_sin), v, self)
        return self.o_proj(y.flatten(1))

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.gemma = c.gemma

    def forward(self, x):
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.self_attn = Attention(c, index)
        self.mlp = MLP(c)
        self.gemma = c.gemma
        names = ["input_layernorm", "post_attention_layernorm"]
        if c.gemma:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            setattr(self, name, RMSNorm(c.hidden_size, c.rms_norm_eps, c.gemma))

    def forward(self, x, cos_sin, layout):
        y = self.self_attn(self.input_layernorm(x), cos_sin, layout)
        if self.gemma:      # "sandwich": a branch is normed on its way in and on its way out
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + y           # here post_attention_layernorm is, despite its name, the norm before the MLP
        return x + self.mlp(self.post_attention_layernorm(x))

def cross_entropy(head, x, labels):
    """head (V, C), x (M, C), labels (M,) -> 0-d: the sum, in fp32. A label of -100 counts for nothing."""
    return F.cross_entropy(F.linear(x, head).float(), labels, reduction="sum")

class Transformer(nn.Module):
    """model(ids (B, T)) -> logits (B, T, V). `hidden` and `loss` take packed rows."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.source = None              # the directory it came from: its tokenizer travels with exports
        self.checkpointing = False      # recompute each block in the backward pass: slower, far less memory
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps, c.gemma)})
        if not c.tie_word_embeddings:   # a tied model has no lm_head at all: none is saved by mistake
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=c.raw.get("initializer_range") or 0.02)

    def rope(self, pos, dtype):
        """pos (N,) -> {layer type: (cos, sin)}, each (N, 1, D/2). Angles are fp32."""
        c = self.config
        exponent = torch.arange(0, c.head_dim, 2, device=pos.device, dtype=torch.float32) / c.head_dim
        tables = {}
        for kind, (theta, factor) in c.rope.items():
            angle = pos[:, None, None] * (theta ** -exponent / factor)
            tables[kind] = angle.cos().to(dtype), angle.sin().to(dtype)
        return tables

    def hidden(self, ids, layout, where=None):
        """ids (N,) -> the final normed hidden states (N, C), or only those at the positions where (M,)."""
        c = self.config
        x = self.model["embed_tokens"](ids)
        if c.gemma:     # the scale is rounded to the weights' dtype, 33.94 -> 34 (transformers#29402)
            x = x * torch.tensor(c.hidden_size ** 0.5, dtype=x.dtype)
        tables = self.rope(layout.pos, x.dtype)
        for block, kind in zip(self.model["layers"], c.layer_types):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, tables[kind], layout, use_reentrant=False)
            else:
                x = block(x, tables[kind], layout)
        return self.model["norm"](x if where is None else x[where])

    @property
    def head(self):
        """The matrix (V, C) that turns hidden states into logits; the embedding, where they are tied."""
        return (self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head).weight

    def logits(self, x):
        """x (..., C) -> (..., V), in the weights' dtype."""
        return F.linear(x, self.head)

    def forward(self, ids):
        layout = Packed([ids.shape[1]] * len(ids), ids.device)
        return self.logits(self.hidden(ids.flatten(), layout)).unflatten(0, ids.shape)

    def loss(self, ids, layout, where, labels):
        """The sum of the cross-entropy in fp32, 0-d: the token at where[i] of the row predicts labels[i].
        Divide it by the number of targets of the whole optimizer batch. Then the gradient does not depend
        on how the batch is split. Only targets meet the vocabulary, LOGIT_ROWS at a time."""
        x = self.hidden(ids, layout, where)
        if len(x) <= LOGIT_ROWS:
            return cross_entropy(self.head, x, labels)
        return sum(checkpoint(cross_entropy, self.head, *piece, use_reentrant=False, preserve_rng_state=False)
                   for piece in zip(x.split(LOGIT_ROWS), labels.split(LOGIT_ROWS)))

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, eos_ids=(), temperature=0.0, generator=None, bar=None):
        """Continue prompts (lists of token ids) until an EOS or max_new_tokens; greedy at temperature 0.
        -> the new tokens of each prompt, with the EOS. On a GPU the greedy step becomes a CUDA graph,
        because its kernels take longer to launch one by one than to run. bar.update(n) is told how many
        prompts have one more token."""
        if not prompts or not all(prompts):
            raise ValueError("generate needs prompts of at least one token each")
        weight = self.model["embed_tokens"].weight
        device = weight.device
        lengths = [len(p) for p in prompts]
        cache = KVCache(self.config, lengths, max(lengths) + max_new_tokens, weight.dtype, device)
        eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)

        def choose(x):                                                      # (B, C) -> (B,)
            logits = self.logits(x).float()
            if temperature == 0:
                return logits.argmax(-1)
            return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

        def step():     # in place, on tensors that stay where they are, so that a graph can replay it
            token.copy_(choose(self.hidden(token, cache)))
            cache.pos += 1
            done.logical_or_((token[:, None] == eos).any(1))

        last = cache.prompts.cu_seqlens[1:].long() - 1
        token = choose(self.hidden(torch.tensor(sum(prompts, []), device=device), cache, last))
        done = (token[:, None] == eos).any(1)
        cache.begin_decoding()
        new = [token.clone()]
        advance = step
        look_every = 16 if weight.is_cuda else 1        # to look at `done` is a sync
        while len(new) < max_new_tokens:
            if len(new) % look_every == 0 and done.all():
                break
            if len(new) == 2 and weight.is_cuda and temperature == 0 and not in_step(self):
                graph = torch.cuda.CUDAGraph()          # cuBLAS starts in the first step; a capture can't
                with torch.cuda.graph(graph):
                    step()
                advance = graph.replay
            advance()
            new.append(token.clone())
            if bar:
                bar.update(len(prompts))
        rows = torch.stack(new, dim=1).tolist()
        ends = [next((i + 1 for i, t in enumerate(row) if t in eos_ids), len(row)) for row in rows]
        return [row[:n] for row, n in zip(rows, ends)]

    @classmethod
    def from_pretrained(cls, path_or_repo, dtype=None, device="cpu"):
        """"toy", a directory, or a hub id -> the model. dtype None keeps the stored one."""
        source = find_checkpoint(path_or_repo)
        config = read_config(source)
        dtype = dtype or config.dtype
        if config.gemma and dtype == torch.float16:
            raise ValueError("Gemma-3's activations (up to 800,000) overflow fp16: use bfloat16 or float32")
        with torch.device("meta"):
            model = cls(config)
        model.source = source
        model.load_state_dict(load_weights(model, source, dtype, device), assign=True)
        return model

    @torch.no_grad()
    def save_pretrained(self, directory, dtype=None):
        """Write what `transformers` loads: config, merged weights, tokenizer and generation files."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        dtype = dtype or self.model["embed_tokens"].weight.dtype
        layers = {f"{name}.weight": layer for name, layer in molf_layers(self)}
        sizes = {name: p.numel() * dtype.itemsize for name, p in self.named_parameters()
                 if name.endswith((".weight", ".bias"))}                    # no expert's name does

        def tensors():
            for group in whole_groups(self):
                for name in [name for name in group if name in sizes]:
                    p = layers[name].merged() if name in layers else self.get_parameter(name)
                    # a copy, where the memory of a group is taken back when the next one comes
                    yield name, p.detach().to("cpu", dtype, copy=in_step(self)).contiguous()

        raw = {k: v for k, v in self.config.raw.items() if k != "dtype"}
        raw["architectures"] = ["Gemma3ForCausalLM" if self.config.gemma else "Qwen2ForCausalLM"]
        raw["torch_dtype"] = str(dtype).removeprefix("torch.")
        if self.source and self.source.resolve() != directory.resolve():
            copy_companions(self.source, directory)
        save_weights(directory, sizes, tensors())
        save_safely(directory / "config.json", json.dumps(raw, indent=2) + "\n")

    @torch.no_grad()
    def save_adapter(self, directory, base):
        """On a frozen base: all LoRA experts, concatenated into one LoRA, for `peft`; stored as fp32. Their
        scales are inside B, so lora_alpha = r. rsLoRA's flag is off, as not all readers know it (vllm#6909).
        base: where the base model is, a directory or a hub id."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        layers = dict(molf_layers(self))
        state = {}
        names, targets = peft_names(self.source, list(layers))
        peft_name = dict(zip(layers, names))
        for group in whole_groups(self):
            for name in [name for name in layers if f"{name}.A.0" in group]:
                for key, matrix in zip("AB", layers[name].stacked()):
                    # without the prefix peft loads nothing and says nothing
                    key = f"base_model.model.{peft_name[name]}.lora_{key}.weight"
                    state[key] = matrix.float().cpu().contiguous()
        rank = sum(next(iter(layers.values())).ranks)
        config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank,
                      lora_alpha=rank, use_rslora=False, lora_dropout=0.0, bias="none", inference_mode=True,
                      target_modules=targets, fan_in_fan_out=False)
        weights = directory / "adapter_model.safetensors"
        save_safely(weights, lambda path: save_file(state, path, {"format": "pt"}))
        save_safely(directory / "adapter_config.json", json.dumps(config, indent=2) + "\n")

# ------------------------------------------------------------------------------------------------------------
# MoLF: the experts of a linear layer

def draw_A(r, n, device, dtype):
    """-> A (r, n) of a LoRA expert before training: U(-1/sqrt(n), 1/sqrt(n)), drawn in fp32"""
    a = torch.empty(r, n, device=device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a.to(dtype)

class MoLFLinear(nn.Linear):
    """A linear whose weight is a sum of experts, W + sum_i s_i B_i A_i. It has one of three forms:

        experts that train          `weight` is     W is in         forward pass
        W and LoRA: folded          W_eff           `full`, fp32    x weight^T
        LoRA, or not folded         W               `weight`        x W^T + sum s dropout(x) A^T B^T
        W alone                     W               `weight`        x W^T

    unfold and fold carry gradients out of a folded layer and new weights into it. In the other forms
    autograd gives all gradients, and a frozen W has no full-size gradient. The bias belongs to the full
    expert. A and B have the model's dtype; the optimizer keeps fp32 masters of all that trains in bf16."""

    def __init__(self, linear, ranks, alpha, full, dropout, fold):
        nn.Module.__init__(self)                # not nn.Linear's, which would make a new weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.folded = bool(fold and full and ranks and not dropout)
        self.ranks = tuple(ranks)
        self.dropout = dropout
        self.scales = [alpha / math.sqrt(r) for r in ranks]
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()
        for r in ranks:
            self.A.append(draw_A(r, self.in_features, self.weight.device, self.weight.dtype))   # (r, in)
            self.B.append(self.weight.new_zeros(self.out_features, r))                          # (out, r)
        self.weight.requires_grad_(full)
        if full and self.bias is not None:
            self.bias.requires_grad_(True)
        if self.folded:
            self.start_full()

    def start_full(self):
        """The full expert of a folded layer begins as the weight, (out, in) in fp32."""
        self.full = nn.Parameter(self.weight.detach().to(torch.float32, copy=True))
        self.full.grad_dtype = None             # its gradient G may be bf16, without a copy in fp32

    def experts(self):
        """[(kind, scale, parameters)], the full expert first: what the optimizer routes between."""
        experts = []
        if self.weight.requires_grad:
            w = [self.full if self.folded else self.weight]
            if self.bias is not None and self.bias.requires_grad:
                w.append(self.bias)
            experts.append(("full", 1.0, w))
        for s, a, b in zip(self.scales, self.A, self.B):
            experts.append(("lora", s, [a, b]))
        return experts

    def stacked(self):
        """All LoRA experts as one of rank R = sum r_i: A (R, in), and B (out, R) with the scales inside."""
        scaled = [s * b for s, b in zip(self.scales, self.B)]
        return torch.cat(list(self.A)), torch.cat(scaled, dim=1)

    def merged(self):
        """W_eff: the weight, where it is that; else W + sum s B A, added in fp32."""
        if self.folded or not self.ranks:
            return self.weight
        a, b = self.stacked()
        return torch.addmm(self.weight.float(), b.float(), a.float())

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.folded or not self.ranks:
            return y
        a, b = self.stacked()
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return y + F.linear(F.linear(x, a), b)

def molf_layers(model):
    """-> [(name, MoLFLinear)]"""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, MoLFLinear)]

def add_experts(model, ranks=(128,), alpha=32, full=True, dropout=0.0, targets=TARGETS, train_rest=None,
                fold=True):
    """Put experts into every nn.Linear of `model`, any nn.Module, whose last name is one of `targets`.

        fft:  add_experts(m, ranks=())              lora:   add_experts(m, full=False)
        molf: add_experts(m)                        molf-e: add_experts(m, ranks=(32, 128), full=False)

    train_rest: whether all else trains (embedding, norms, head, biases without a full expert). None, as in
    the paper: the same as `full`. fold=False: LoRA stays a side branch, as it does with dropout. Move the
    model to its device and dtype first. -> the MoLFLinears"""
    if not ranks and not full:
        raise ValueError("no expert to train: give ranks, or full=True")
    if any(r < 1 for r in ranks):
        raise ValueError(f"ranks must be at least 1, got {list(ranks)}")
    if molf_layers(model):
        raise ValueError("the model has experts already")
    model.requires_grad_(full if train_rest is None else train_rest)
    layers = []
    for name, linear in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(linear, nn.Linear) and leaf in targets:
            layers.append(MoLFLinear(linear, ranks, alpha, full, dropout, fold))
            setattr(model.get_submodule(parent), leaf, layers[-1])
    if not layers:
        raise ValueError(f"the model has no nn.Linear named {', '.join(targets)}: give its names as targets")
    return layers

# lib/fast.py compiles fold_layer.

spread = iter       # the loops of unfold and fold run through it; lib/fast.py puts them on CUDA streams

def scaled_mm(s, x, y):
    """s x y. addmm's alpha scales the fp32 sum before it is rounded, and saves a pass. addmm wants a first
    argument, which beta = 0 ignores."""
    return torch.addmm(x[0, 0], x, y, beta=0, alpha=s)

def lora_gradients(G, s, A, B):
    """G (out, in), A (r, in), B (out, r) -> dL/dA = s B^T G (r, in) and dL/dB = s G A^T (out, r)"""
    return scaled_mm(s, B.T, G), scaled_mm(s, G, A.T)

def fold_layer(weight, W, scales, A, B):
    """weight <- W + sum s B A, in place. B A is computed in the weight's dtype, then added to W in fp32. Its
    rounding is below that of the sum, while s B A is small beside W."""
    total = W
    for s, a, b in zip(scales, A, B):
        total = total + s * (b @ a).to(W.dtype)
    weight.copy_(total)

@torch.no_grad()
def unfold(model):
    """One G -> the gradient of every expert, exact but for rounding to G's dtype. Call it once, after the
    last backward pass and before the optimizer's step: it overwrites the experts' gradients."""
    for layer in spread([m for _, m in molf_layers(model) if m.folded]):
        G = layer.weight.grad                                           # (out, in)
        layer.weight.grad = None
        if G is None:                                                   # the layer took no part in the loss
            continue
        layer.full.grad = G                                             # dL/dW = G
        for s, a, b in zip(layer.scales, layer.A, layer.B):
            a.grad, b.grad = lora_gradients(G, s, a.detach(), b.detach())

@torch.no_grad()
def fold(model):
    """weight <- W + sum s B A. Call it after the optimizer's step."""
    for layer in spread([m for _, m in molf_layers(model) if m.folded]):
        A = [a.detach() for a in layer.A]
        B = [b.detach() for b in layer.B]
        fold_layer(layer.weight.detach(), layer.full.detach(), layer.scales, A, B)

# ------------------------------------------------------------------------------------------------------------
# checkpoints in Hugging Face format

def read_config(directory):
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a checkpoint has config.json and *.safetensors")
    raw = read_json(path)
    with naming(path):
        return Config.from_dict(raw)

def load_weights(model, directory, dtype, device, rows=None):
    """-> {name: parameter} for a model on the meta device, from safetensors; every tensor is accounted for.
    Of a multimodal Gemma-3 the text part is taken, under either of its two prefixes. rows: {name: slice},
    to read no more than these. On the meta device nothing is read but names, types and shapes."""
    want = dict(model.named_parameters())
    got, unexpected, wrong, head = {}, [], [], None

    def read(f, key, name):
        if str(device) == "meta":
            return torch.empty_like(want[name])
        return f.get_slice(key)[rows[name]].to(device) if rows else f.get_tensor(key)

    for file in weight_files(directory):
        try:
            with safe_open(file, "pt", device="cpu" if str(device) == "meta" else str(device)) as f:
                for key in progress(f.keys(), f"reading {file.name}", "tensors"):
                    if "vision_tower." in key or "multi_modal_projector." in key:
                        continue
                    name = key.replace("model.language_model.", "model.").removeprefix("language_model.")
                    if name == "lm_head.weight" and model.config.tie_word_embeddings:
                        head = read(f, key, "model.embed_tokens.weight")    # must be a copy of the embedding
                        continue
                    stored = f.get_slice(key)
                    shape = stored.get_shape()
                    if name not in want:
                        unexpected.append(name)
                    elif shape != list(want[name].shape):
                        wrong.append(f"{name} is {shape}, not {list(want[name].shape)}")
                    else:
                        refuse_quantised(name, stored.get_dtype())
                        got[name] = nn.Parameter(read(f, key, name).to(dtype))
        except SafetensorError as e:
            raise ValueError(f"{file} is not a whole safetensors file ({e}): get it again") from e
    missing = [name for name in want if name not in got]
    troubles = {"wrong shapes": wrong, "missing tensors": missing, "unexpected tensors": unexpected}
    for what, names in troubles.items():
        if names:
            raise ValueError(f"{directory}: {len(names)} {what}: {', '.join(names[:5])}; do config.json and "
                             f"the weights belong together?")
    if str(device) == "meta":
        return got
    refuse_infinite(got)
    if head is not None and not torch.equal(head.to(dtype), got["model.embed_tokens.weight"]):
        raise ValueError(f"{directory}: lm_head.weight differs from the embedding, although tied; "
                         f"to use it, set tie_word_embeddings to false there")
    return got

def main(argv):
    from data import Tokenizer, encode_prompt
    try:
        path, prompt, temperature = (argv + ["0"])[:3]
        temperature = float(temperature)
    except ValueError:
        print(__doc__.split("\n\n")[1], file=sys.stderr)
        sys.exit(2)
    try:
        if not temperature >= 0:
            raise ValueError(f"temperature {temperature} is not 0 or more")
        model = Transformer.from_pretrained(path, device="cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = Tokenizer.from_file(model.source)
        ids = encode_prompt(tokenizer, prompt)
        new = model.generate([ids], 100, tokenizer.eos_ids, temperature)[0]
    except (ValueError, OSError) as e:
        sys.exit(f"error: {one_line(e)}")
    print(prompt + tokenizer.decode(new))

if __name__ == "__main__":
    main(sys.argv[1:])
