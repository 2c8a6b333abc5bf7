"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: each layer is a Mamba mixer, attention without
positions, an MLP of squared ReLU or experts of such MLPs.

On the hub, and in transformers' files, the model is called `backbone`. transformers counts the
tokens it has seen in the cache of an attention layer, so that there must be one; it has no class
for the layers for multi-token prediction, and does not tie the output layer to the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mcorefs.mapping.blocks.attention import GQA, as_stored
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    EPSILON,
    GQA_KEYS,
    MODEL_KEYS,
    constant,
    decoder_requires,
    dim,
    soft_arg,
)
from mcorefs.mapping.blocks.mamba import MIXER_KEYS, known_rows, mixer
from mcorefs.mapping.blocks.mlp import MLP_ALL_OR_NO_BIAS, expert_bias, router
from mcorefs.mapping.blocks.model import norm, unpad
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS
from mcorefs.mapping.blocks.names import EMBEDDING, INPUT_NORM, LAYER, MLAYER, MLP_NORM, OUTPUT
from mcorefs.mapping.blocks.routing import (
    SIGMOID_KEYS,
    SIGMOID_REQUIRES,
    best_two_of_each_group,
    no_sinkhorn,
)
from mcorefs.mapping.family import LEFT_OUT, Facts, Family, Key, Proven, Rule

_HF = "backbone.layers.{layer}."
_MIXER = _HF + "mixer."
_FC1 = "decoder.layers.*.mlp.linear_fc1.weight"
_ROUTER = "decoder.layers.*.mlp.router.weight"
_LATENT = "decoder.layers.*.mlp.fc1_latent_proj.weight"
_NORMS = (MLAYER + "mixer.in_proj.layer_norm_", MLAYER + "norm.", *INPUT_NORM, *MLP_NORM)

# -- tensors --------------------------------------------------------------------------------------


def _called_mixer(rules: Iterable[Rule], **changes: object) -> Iterator[Rule]:
    """Rules of a decoder's attention or MLP, for a layer that has nothing else."""
    for rule in rules:
        name = rule.hf.rpartition("self_attn.")[2].rpartition("mlp.")[2].removeprefix(LAYER)
        yield replace(rule, hf=_MIXER + name, **changes)  # type: ignore[arg-type]


def _mlp(hf: str, at: str, wide: str, narrow: str, memory: str = "") -> Iterator[Rule]:
    """The two projections of an MLP in a layer with experts."""
    for name, source, shape in (
        ("up_proj", "linear_fc1.weight", (wide, narrow)),
        ("down_proj", "linear_fc2.weight", (narrow, wide)),
    ):
        sorts_as = f"{_MIXER}{memory}{name}" if memory else ""
        yield Rule(
            f"{_MIXER}{hf}{name}.weight",
            f"{MLAYER}mlp.{at}{source}",
            shape,
            layers="moe",
            when=_ROUTER,
            sorts_as=sorts_as,
        )


def _latent(name: str, *shape: str) -> Rule:
    source = f"{MLAYER}mlp.{name}.weight"
    return Rule(f"{_MIXER}{name}.weight", source, shape, layers="moe", when=_LATENT)


def _in_memory(rule: Rule) -> Rule:
    """Sorted by what transformers calls it there."""
    return replace(rule, sorts_as=(rule.sorts_as or rule.hf).replace("backbone.", "model.", 1))


_RULES = (
    Rule("backbone.embeddings.weight", EMBEDDING, ("vocab", "hidden"), unpad),
    *mixer(_MIXER),
    *_called_mixer(as_stored(*GQA), layers="self_attention"),
    *_called_mixer(MLP_ALL_OR_NO_BIAS[::2], layers="mlp", when=_FC1),
    *_called_mixer(
        (router("gate.weight"), expert_bias("gate.e_score_correction_bias")), when=_ROUTER
    ),
    *_mlp("experts.{expert}.", "experts.{expert}.", "moe_ffn", "moe_hidden", "experts."),
    *_mlp("shared_experts.", "shared_experts.", "shared_ffn", "hidden"),
    _latent("fc1_latent_proj", "moe_latent", "hidden"),
    _latent("fc2_latent_proj", "hidden", "moe_latent"),
    norm(_HF + "norm.", *_NORMS),
    norm("backbone.norm_f.", "decoder.final_norm."),
    Rule("lm_head.weight", (OUTPUT, EMBEDDING), ("vocab", "hidden"), unpad),
)

# -- what each layer is ---------------------------------------------------------------------------


def _letters(facts: Facts) -> list[str]:
    """What each layer is by its tensors, in the letters of hybrid_override_pattern
    (Megatron-LM:megatron/core/ssm/mamba_hybrid_layer_allocation.py)."""
    found = [""] * facts.dims["layers"]
    for module, letter in (("mixer", "M"), ("self_attention", "*"), ("mlp", "-")):
        for layer in facts.modules.get(module, frozenset()) & set(range(len(found))):
            found[layer] += "E" if letter == "-" and layer in facts.moe_layers else letter
    return found


def _pattern(facts: Facts) -> str:
    return "".join(_letters(facts))


_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}
"""What transformers 5 says in layers_block_type, now and in its first versions."""


def _read_pattern(stated: object) -> object:
    if not isinstance(stated, list):
        return stated
    return "".join(_TYPES.get(str(one), "?") for one in stated)


def one_module_each(facts: Facts) -> str | None:
    """Check: no layer has both attention and an MLP, as those of other models have, or neither."""
    odd = [layer for layer, letters in enumerate(_letters(facts)) if len(letters) != 1]
    if not odd:
        return None
    return (
        f"layers {odd} are not one of a Mamba mixer, attention, an MLP or experts each, as all of "
        "this family are"
    )


def as_arranged(facts: Facts) -> str | None:
    """Check: layers are what the arguments say. Newer ones have | where a pipeline stage ends, and
    behind / what the layers for multi-token prediction are
    (Megatron-LM:megatron/core/models/hybrid/hybrid_layer_allocation.py)."""
    said = facts.arg("hybrid_layer_pattern", "hybrid_override_pattern")
    if not isinstance(said, str):
        return None
    main = said.partition("/")[0].replace("|", "")
    if main == _pattern(facts):
        return None
    return (
        f"the layers are {main} by the training arguments but {_pattern(facts)} by the tensors "
        "(M: Mamba, *: attention, -: MLP, E: experts)"
    )


def some_attention(facts: Facts) -> str | None:
    """Check: transformers' model can run."""
    if facts.modules.get("self_attention"):
        return None
    return (
        "no layer is one of attention: transformers counts the tokens it has seen in the cache of "
        "one, and cannot run a model that has none"
    )


def routed_by_sigmoids(facts: Facts) -> str | None:
    """Check: experts are chosen as transformers chooses them, if there are any: a model without
    them has arguments for their router all the same."""
    for name, allowed in SIGMOID_REQUIRES.items() if facts.moe_layers else ():
        value = facts.arg(name)
        if value is not None and value not in allowed:
            return (
                f"the model was trained with {name}={value!r}, a routing that transformers' model "
                "does not have: its output would differ"
            )
    return None


def no_mtp(facts: Facts) -> str | None:
    """Check: there is nothing for multi-token prediction."""
    if not any(name.startswith("mtp.") for name in facts.kinds):
        return None
    return (
        "it holds layers for multi-token prediction, which no release of megatron-core (up to "
        "0.16) can save in a hybrid model: until one can, there is nothing to test their names and "
        "order with; --no-mtp serves the model without them"
    )


# -- config.json ----------------------------------------------------------------------------------


def _of_experts(key: Key) -> Key:
    """`key`, of models that have any."""
    return replace(key, value=lambda facts: key.value(facts) if facts.moe_layers else LEFT_OUT)


_MOE_KEYS = {
    **SIGMOID_KEYS,
    "n_routed_experts": dim("experts", "num_local_experts"),
    "n_shared_experts": constant(1),
    "moe_intermediate_size": dim("moe_ffn"),
    "moe_shared_expert_intermediate_size": dim("shared_ffn"),
    "moe_latent_size": Key(lambda facts: facts.dims.get("moe_latent"), None),
}

NEMOTRON_H = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    rules=tuple(map(_in_memory, _RULES)),
    config={
        **MODEL_KEYS,
        "tie_word_embeddings": Key(lambda facts: Proven(False)),
        "hidden_size": dim("hidden"),
        "num_hidden_layers": dim("layers"),
        "hybrid_override_pattern": Key(
            _pattern, aliases=("layers_block_type", "layer_types"), read=_read_pattern
        ),
        "intermediate_size": BASE_KEYS["intermediate_size"],
        "max_position_embeddings": BASE_KEYS["max_position_embeddings"],
        "attention_dropout": BASE_KEYS["attention_dropout"],
        "hidden_dropout": soft_arg("hidden_dropout", default=0.0),
        **GQA_KEYS,
        **MIXER_KEYS,
        **NEXTN_KEYS,
        **{name: _of_experts(key) for name, key in _MOE_KEYS.items()},
        "layer_norm_epsilon": EPSILON,
        "mlp_hidden_act": Key(lambda facts: "relu2"),
        "attention_bias": constant(False),
        "mlp_bias": Key(lambda facts: False),
        "use_bias": Key(lambda facts: False),
        "residual_in_fp32": soft_arg("fp32_residual_connection", default=False),
    },
    requires={
        **decoder_requires("position_embedding_type", "rotary_percent", "no_rope_freq"),
        "position_embedding_type": ("none",),
        "swiglu": (False,),
        "squared_relu": (True,),
        "layernorm_epsilon": (1e-5,),
        "norm_epsilon": (1e-5,),
    },
    checks=(
        one_module_each,
        as_arranged,
        some_attention,
        no_mtp,
        known_rows,
        routed_by_sigmoids,
        no_sinkhorn,
        best_two_of_each_group,
    ),
    only_words=True,
    natural_order=True,
)
"""The epsilon of a mixer's norm is 1e-5 in megatron-core, and that of the other norms in
transformers."""
