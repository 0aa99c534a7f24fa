"""Every shape in configs/ builds, and has the parameters it should have."""

import pytest
from support.runs import ROOT

from peft_pretraining.model.build import meta_model
from peft_pretraining.model.config import read_config

CONFIGS = ROOT / "configs"
SHAPES = {  # hidden, intermediate, layers, heads, vocabulary, longest sequence
    "arena_small": (256, 688, 4, 4, 4096, 1024),
    "arena_medium": (512, 1376, 8, 8, 4096, 1024),
    "3m": (192, 512, 4, 4, 4096, 1024),
    "9m": (128, 352, 4, 4, 32000, 1024),
    "20m": (256, 688, 4, 4, 32000, 1024),
    "35m": (384, 1024, 6, 8, 32000, 1024),
    "40m": (416, 1024, 8, 8, 32000, 1024),
    "60m": (512, 1376, 8, 8, 32000, 1024),
    "71m": (512, 1368, 12, 8, 32000, 1024),
    "100m": (640, 1708, 12, 10, 32100, 1024),
    "130m": (768, 2048, 12, 12, 32000, 1024),
    "250m": (768, 2560, 24, 16, 32000, 1024),
    "350m": (1024, 2736, 24, 16, 32000, 1024),
    "1b": (2048, 5461, 24, 32, 32000, 1024),
    "3b": (2560, 6848, 32, 32, 32000, 1024),
    "7b": (4096, 11008, 32, 32, 32000, 2048),
}


def test_the_table_names_every_file():
    named = {f"llama_{size}.json" for size in SHAPES} | {"llama3_8b.json"}
    assert {path.name for path in CONFIGS.glob("*.json")} == named


def test_llama_3_has_fewer_keys_than_queries():
    """8,030,261,248 parameters, as the published model has."""
    model = meta_model(read_config(CONFIGS / "llama3_8b.json"))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (1024, 4096)
    assert model.config.rope_parameters["rope_theta"] == 500_000


@pytest.mark.parametrize("size", SHAPES)
def test_a_config_builds(size):
    hidden, intermediate, layers, heads, vocabulary, longest = SHAPES[size]
    model = meta_model(read_config(CONFIGS / f"llama_{size}.json"))
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, heads)
    assert config.max_position_embeddings == longest
    assert config.pad_token_id is None and model.model.embed_tokens.padding_idx is None
    assert not config.tie_word_embeddings

    linear = layers * (4 * hidden**2 + 3 * hidden * intermediate)
    norms = (2 * layers + 1) * hidden
    assert sum(p.numel() for p in model.parameters()) == linear + norms + 2 * vocabulary * hidden
    assert sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2) == linear
    assert all(p.is_meta for p in model.parameters())


def test_the_7b_is_the_one_in_the_papers():
    model = meta_model(read_config(CONFIGS / "llama_7b.json"))
    assert sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2) == 6_476_005_376
    assert model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel() == 262_144_000
