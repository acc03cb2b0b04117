"""What a Hugging Face config.json says, in its old or new spelling, for model.Config. model.py calls it."""
import torch

from lib.read import read_json

# What config.json may leave out (the multimodal Gemma-3 files state only what differs from these).
QWEN = dict(rms_norm_eps=1e-6, max_position_embeddings=32768, tie_word_embeddings=False, hidden_act="silu",
            rope_theta=10000.0)
GEMMA = dict(vocab_size=262208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6,
             max_position_embeddings=131072, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh",
             rope_theta=1e6, rope_local_base_freq=1e4, query_pre_attn_scalar=256, sliding_window=4096,
             sliding_window_pattern=6, bos_token_id=2, eos_token_id=1, pad_token_id=0)
# The largest that make sense, of whole numbers (from 1; null is as good as absent) and of others (above 0)
SIZES = dict(vocab_size=10 ** 7, hidden_size=10 ** 6, intermediate_size=10 ** 7, num_hidden_layers=1000,
             num_attention_heads=10 ** 4, num_key_value_heads=10 ** 4, head_dim=10 ** 4,
             max_position_embeddings=10 ** 9, sliding_window_pattern=1000, _sliding_window_pattern=1000)
NUMBERS = dict(rms_norm_eps=1, initializer_range=100, query_pre_attn_scalar=10 ** 6, rope_theta=10 ** 12,
               rope_local_base_freq=10 ** 12, factor=10 ** 6)
SWITCHES = "tie_word_embeddings", "attention_bias", "use_sliding_window"
COPIED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")

def parse_config(raw):
    """A parsed config.json -> the fields of model.Config, by name. ValueError for another family, or for what
    is not built here."""
    if raw.get("model_type") == "gemma3" and "text_config" in raw:      # multimodal: take its text part
        keys = {"eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings",
                "torch_dtype", "dtype"}
        raw = {k: raw[k] for k in keys & set(raw)} | raw["text_config"] | {"model_type": "gemma3_text"}
    if raw.get("model_type") not in ("qwen2", "gemma3_text"):
        raise ValueError(f"model_type {raw.get('model_type')!r} is not supported: qwen2 (Qwen2.5) and "
                         f"gemma3_text (Gemma-3) are")
    gemma = raw["model_type"] == "gemma3_text"
    given = raw
    raw = (GEMMA if gemma else QWEN) | {key: value for key, value in raw.items() if value is not None}
    if missing := [k for k in COPIED if raw.get(k) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    check_values(raw)
    if raw.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights are not supported; get the checkpoint from "
                         "before they were quantised")
    act = raw["hidden_activation" if gemma else "hidden_act"]
    if act != ("gelu_pytorch_tanh" if gemma else "silu"):
        raise ValueError(f"activation {act!r} is not supported in {raw['model_type']}")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if raw.get(key):
            raise ValueError(f"{key} = {raw[key]} is not supported")
    n, heads, types = raw["num_hidden_layers"], raw["num_attention_heads"], raw.get("layer_types")
    kv_heads = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise ValueError(f"{heads} attention heads, {kv_heads} key-value heads of {head_dim} numbers: the "
                         f"heads must be a multiple of the key-value heads, and the numbers even")
    if types is None and gemma:     # every sixth layer is global
        every = raw.get("_sliding_window_pattern") or raw["sliding_window_pattern"]
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    elif types is None:             # Qwen's sliding window is off in the released models
        first = raw.get("max_window_layers", n) if raw.get("use_sliding_window") else n
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != n:
        raise ValueError(f"layer_types has {len(types)} entries for {n} layers" if not unknown else
                         f"layer_types {', '.join(map(repr, unknown))}: only full_attention and "
                         f"sliding_attention are supported")
    window = 0
    if "sliding_attention" in types:
        window = raw.get("sliding_window")
        check_whole("sliding_window", window, 10 ** 9)
    return dict(gemma=gemma, head_dim=head_dim, raw=given,
               num_key_value_heads=kv_heads,
               softmax_scale=(raw["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
               layer_types=list(types), sliding_window=window,
               rope={t: rope_of(raw, t, gemma) for t in set(types)},
               dtype=dtype_of(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
               **{k: raw[k] for k in COPIED})

def check_whole(key, value, most):
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{key} = {value!r} is not a whole number from 1 to {most:,}")

def check_values(raw):
    """ValueError for a number or switch of a config.json, or of its rope, that makes no sense."""
    for key, most in SIZES.items():
        if raw.get(key) is not None:
            check_whole(key, raw[key], most)
    for key, most in NUMBERS.items():
        value = raw.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value <= most):
            raise ValueError(f"{key} = {value!r} is not a number above 0, at most {most:,}")
    for key in SWITCHES:
        if not isinstance(raw.get(key), bool | None):
            raise ValueError(f"{key} = {raw[key]!r} is not true or false")

def peft_names(source, names):
    """names: of our linears. -> their names in the model that AutoModelForCausalLM makes of the checkpoint in
    `source`, and peft's target_modules. A multimodal Gemma-3 has the text model beside a vision tower."""
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if read_json(source / "config.json").get("model_type") != "gemma3":
        return names, leaves
    theirs = ["model.language_model." + name.removeprefix("model.") for name in names]
    return theirs, rf".*\.language_model\..*\.({'|'.join(leaves)})"

def dtype_of(name):
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype {name!r} is not a floating point type that a model computes in")
    return dtype

def rope_of(raw, layer_type, gemma):
    """(theta, factor) of a layer type, as transformers reads them. New files have rope_parameters, in Gemma
    one for each layer type, and old ones rope_theta and rope_scaling. Where a file has both, rope_scaling
    wins. In Gemma it speaks of the global layers only."""
    local = gemma and layer_type == "sliding_attention"
    params = raw.get("rope_parameters") or {}
    params = dict(params.get(layer_type) or params)
    if raw.get("rope_scaling") and not local:
        params = (params if gemma else {}) | raw["rope_scaling"]
    check_values(params)
    theta = params.get("rope_theta", raw["rope_local_base_freq" if local else "rope_theta"])
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind not in ("default", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not supported (default and linear are): take it out of "
                         f"config.json to run the model unscaled")
    return theta, params["factor"] if kind == "linear" else 1.0
