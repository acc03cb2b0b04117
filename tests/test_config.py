"""lib/config.py against the configuration classes of `transformers`."""
import math

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, Qwen2Config

from model import Config, Transformer

QWEN = dict(model_type="qwen2", vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
GEMMA = dict(QWEN, model_type="gemma3_text", head_dim=16, sliding_window=5, query_pre_attn_scalar=24,
             layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"])
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("raw", [
    dict(QWEN), dict(QWEN, rope_theta=5e5), dict(QWEN, rope_parameters={"rope_type": "default"}),
    dict(QWEN, rope_theta=5e5, rope_parameters={"rope_type": "default"}),
    dict(QWEN, rope_parameters={"rope_type": "default", "rope_theta": 7e4}),
    dict(QWEN, rope_parameters={"rope_type": "default", "rope_theta": 7e4}, rope_scaling=LINEAR),
    dict(QWEN, rope_parameters={"rope_type": "default", "rope_theta": 7e4}, rope_scaling=LINEAR,
         rope_theta=3e4),
    dict(QWEN, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=3e4),
    dict(GEMMA), dict(GEMMA, rope_theta=5e5, rope_local_base_freq=3e4), dict(GEMMA, rope_scaling=LINEAR),
    dict(GEMMA, rope_parameters={"full_attention": dict(LINEAR, rope_theta=2e5),
                                 "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}),
    dict(GEMMA, rope_scaling=dict(LINEAR, factor=8.0), rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 2e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}),
    dict(GEMMA, rope_parameters={"full_attention": {"rope_type": "default"},
                                 "sliding_attention": {"rope_type": "default"}})])
def test_rope_is_read_as_transformers_reads_it(raw):
    cls = Gemma3TextConfig if raw["model_type"] == "gemma3_text" else Qwen2Config
    theirs = cls.from_dict(dict(raw)).rope_parameters
    for kind, (theta, factor) in Config.from_dict(dict(raw)).rope.items():
        params = theirs.get(kind, theirs)
        assert theta == params["rope_theta"] and factor == params.get("factor", 1.0), kind


@pytest.mark.parametrize("change, message", [
    (dict(layer_types=["full_attention"] * 3), "layer_types has 3 entries for 4 layers"),
    (dict(layer_types=["full_attention"] * 5), "layer_types has 5 entries for 4 layers"),
    (dict(layer_types=["full_attention"] * 3 + ["linear_attention"]), "layer_types 'linear_attention'"),
    (dict(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
    (dict(num_hidden_layers=100_000), "num_hidden_layers = 100000 is not a whole number from 1 to 1,000"),
    (dict(hidden_size=-64), "hidden_size = -64"), (dict(vocab_size="97"), "vocab_size = '97'"),
    (dict(num_attention_heads=0), "num_attention_heads = 0"), (dict(hidden_size=64.0), "hidden_size = 64.0"),
    (dict(vocab_size=True), "vocab_size = True"), (dict(vocab_size=10 ** 12), "vocab_size = 1000000000000"),
    (dict(num_key_value_heads=3), "must be a multiple"), (dict(head_dim=3), "the numbers even"),
    (dict(rope_theta=-1), "rope_theta = -1 is not a number above 0"),
    (dict(rope_theta="x"), "rope_theta = 'x'"), (dict(rms_norm_eps=-1e-6), "rms_norm_eps = -1e-06"),
    (dict(rope_theta=math.nan), "rope_theta = nan"), (dict(rope_theta=math.inf), "rope_theta = inf"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta = 0"),
    (dict(rope_scaling=dict(LINEAR, factor=0)), "factor = 0"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings = 'no' is not true or false"),
    (dict(layer_types=["sliding_attention"] * 4, sliding_window=0), "sliding_window = 0"),
    (dict(layer_types=["sliding_attention"] * 4), "sliding_window = None"),
    (dict(initializer_range={}), "initializer_range = {}"),
    (dict(initializer_range=-1), "initializer_range = -1"),
    (dict(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn'"),
    (dict(dtype="int8"), "dtype 'int8' is not a floating point"), (dict(dtype="nn"), "dtype 'nn'")])
def test_what_cannot_be_run_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(QWEN | change)


@pytest.mark.parametrize("raw", [QWEN, GEMMA])
def test_null_is_as_good_as_absent(raw):
    """In what may be left out. A model is made of each, with numbers that are drawn."""
    nulls = dict.fromkeys(["rope_theta", "rope_local_base_freq", "tie_word_embeddings", "layer_types",
                           "sliding_window_pattern", "rope_scaling", "initializer_range", "rms_norm_eps"])
    left_out = {key: value for key, value in raw.items() if key not in nulls}
    first, other = Config.from_dict(left_out), Config.from_dict(raw | nulls)
    assert vars(first) | {"raw": None} == vars(other) | {"raw": None}
    weights = []
    for config in (first, other):
        torch.manual_seed(0)
        weights.append(Transformer(config).model.embed_tokens.weight)
    assert torch.equal(*weights) and 0.019 < weights[0].std() < 0.021


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16"])
def test_both_spellings_of_a_dtype(spelling):
    theirs = AutoConfig.for_model(**QWEN, dtype="bfloat16").dtype
    assert Config.from_dict(QWEN | {"dtype": spelling}).dtype == theirs
