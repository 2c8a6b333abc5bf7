"""GLM-4.1V: GLM-4's language model, and what sees for it."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values
from .glm4 import GLM4
from .qwen3_vl import END, IMAGE, START, VIDEO

_GLM4V = Spec(
    family="glm4v",
    vision="ms-swift",
    common="no_args",
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=10_000,
    output_norms=("self_attention.post_self_attn_layernorm", "mlp.post_mlp_layernorm"),
)
_MBRIDGE = ("post_self_attn_layernorm", "post_mlp_layernorm")
MROPE = [1, 2, 1]
"""Of few elements, since few are rotated."""


def with_mrope(text: Values) -> Values:
    rotary = text["rope_parameters"]
    assert isinstance(rotary, dict)
    return {**text, "rope_parameters": {**rotary, "mrope_section": MROPE}}


def seeing(spec: Spec) -> Values:
    return {
        "vision_config": {
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_heads": 4,
            "out_hidden_size": spec.hidden,
            "image_size": 24,
            "patch_size": 4,
            "attention_bias": spec.tied,
            "rms_norm_eps": 2e-5,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": 294,
        "video_end_token_id": 295,
    }


def _config(spec: Spec) -> Values:
    found = with_mrope(GLM4.config(spec))
    return {**{k: v for k, v in found.items() if k != "head_dim"}, "attention_bias": True}


def _arguments(spec: Spec) -> Values:
    return {
        **GLM4.arguments(spec),
        "add_qkv_bias": True,
        "position_embedding_type": "mrope",
        "mrope_section": MROPE,
    }


def _built(spec: Spec) -> Values:
    """megatron-core's own mrope cannot rotate neighbours: of a text, it is the same as rope."""
    return {"position_embedding_type": "rope", "mrope_section": None}


GLM4V = Family(
    {
        "glm4v-swift-tp2": _GLM4V.but(tp=2, hf_max_shard_size="60KB", seed=350),
        "glm4v-swift-pp2-tied": _GLM4V.but(pp=2, tied=True, common="common.pt", seed=351),
        "glm4v-mbridge-tp2-pp2": _GLM4V.but(
            vision="megatron-bridge", tp=2, pp=2, output_norms=_MBRIDGE, seed=352
        ),
        "torch-glm4v-swift-tp2-pp2": _GLM4V.but(
            format="torch", tp=2, pp=2, common="common.pt", names="te", seed=353
        ),
        "torch-glm4v-swift-tp2": _GLM4V.but(format="torch", tp=2, seed=354),
    },
    config=_config,
    arguments=_arguments,
    built=_built,
    vision=seeing,
    parameters=GLM4.parameters,
)
