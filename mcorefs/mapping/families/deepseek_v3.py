"""DeepSeek-V3, V3.1 and R1, Moonlight, Kimi-K2: multi-latent attention, dense layers before those
of experts, routers of sigmoids with a bias, layers for multi-token prediction.

Kimi-K2 calls itself `kimi_k2`, for which its repository has code of its own that does the same: it
is served as `deepseek_v3`, which transformers, vLLM and SGLang know without that.

transformers' norms of latents have an epsilon of 1e-6 whatever rms_norm_eps says (Moonlight: 1e-5);
vLLM's have the model's, as Megatron's do.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.deepseek import DEEPSEEK_CHECKS, DEEPSEEK_KEYS, DEEPSEEK_LAYER
from mcorefs.mapping.blocks.mla import MLA_REQUIRES
from mcorefs.mapping.blocks.mlp import expert_bias
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_behind
from mcorefs.mapping.blocks.routing import SIGMOID_REQUIRES, best_two_of_each_group
from mcorefs.mapping.family import Family, Key

_LAYER = (*DEEPSEEK_LAYER, expert_bias("mlp.gate.e_score_correction_bias"))

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rules=(EMBED, *_LAYER, NORM, *mtp_behind(_LAYER), HEAD),
    config={
        **DEEPSEEK_KEYS,
        **NEXTN_KEYS,
        "rope_interleave": Key(lambda facts: True),
        "scoring_func": Key(lambda facts: "sigmoid"),
        "topk_method": Key(lambda facts: "noaux_tc"),
    },
    requires={**MLA_REQUIRES, **SIGMOID_REQUIRES},
    checks=(*DEEPSEEK_CHECKS, best_two_of_each_group),
    other_names=("kimi_k2",),
    natural_order=True,
)
