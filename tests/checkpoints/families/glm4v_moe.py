"""GLM-4.5V: GLM-4.5's language model, and what sees for it."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values
from .glm4_moe import GLM4_MOE
from .glm4v import MROPE, seeing, with_mrope

_GLM4V_MOE = Spec(
    family="glm4v_moe",
    vision="megatron-bridge",
    common="no_args",
    experts=8,
    shared_ffn=48,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.5,
    qk_norm=False,
    norm_eps=1e-5,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    found = with_mrope(GLM4_MOE.config(spec))
    return {k: v for k, v in found.items() if k != "num_mtp_layers"}


def _arguments(spec: Spec) -> Values:
    return {
        **GLM4_MOE.arguments(spec),
        "position_embedding_type": "mrope",
        "mrope_section": MROPE,
    }


GLM4V_MOE = Family(
    {
        "glm4v_moe-tp2-ep2": _GLM4V_MOE.but(tp=2, ep=2, etp=1, hf_max_shard_size="100KB", seed=360),
        "glm4v_moe-swift-pp2-ep2": _GLM4V_MOE.but(
            vision="ms-swift", pp=2, dp=2, ep=2, common="common.pt", seed=361
        ),
        "torch-glm4v_moe-swift-tp2-pp2-ep2": _GLM4V_MOE.but(
            format="torch",
            vision="ms-swift",
            tp=2,
            pp=2,
            ep=2,
            etp=1,
            common="common.pt",
            names="te",
            seed=362,
        ),
        "torch-glm4v_moe-tp2": _GLM4V_MOE.but(format="torch", tp=2, common="common.pt", seed=363),
    },
    config=_config,
    arguments=_arguments,
    vision=seeing,
    parameters=GLM4_MOE.parameters,
)
