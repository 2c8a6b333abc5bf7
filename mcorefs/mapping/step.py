"""The config.json of a Step-3.5, in the words of the hub's.

transformers 5 reads that one, but saves another: what differs between layers with a window and
those without by their kind, not by layer (transformers:src/transformers/models/step3p7/
configuration_step3p7.py Step3p7TextConfig). In the hub's, lists go on for layers for multi-token
prediction.
"""

from __future__ import annotations

from collections.abc import Mapping

MODEL_TYPE = "step3p5"
_RENAMED = {
    "num_key_value_heads": "num_attention_groups",
    "num_experts_per_tok": "moe_top_k",
    "n_routed_experts": "moe_num_experts",
    "share_expert_dims": "share_expert_dim",
}
_OF_TRANSFORMERS = (
    "mlp_layer_types",
    "mtp_layer_types",
    "mtp_mlp_layer_types",
    "num_local_experts",
    "num_sliding_attention_heads",
    "per_layer_config",
    "rope_parameters",
)
_LISTS = (
    "layer_types",
    "partial_rotary_factors",
    "rope_theta",
    "swiglu_limits",
    "swiglu_limits_shared",
    "use_rope_layers",
)
_ROTATES = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def from_transformers(config: Mapping[str, object]) -> dict[str, object]:
    """`config` by layers, if it is transformers' of a Step-3.5; others as they are."""
    kinds = config.get("layer_types")
    if config.get("model_type") != MODEL_TYPE or "mlp_layer_types" not in config:
        return dict(config)
    found = _renamed({k: v for k, v in config.items() if k not in _OF_TRANSFORMERS})
    mlps, rope = config["mlp_layer_types"], config.get("rope_parameters")
    if isinstance(mlps, list):
        sparse = (str(layer) for layer, kind in enumerate(mlps) if kind == "sparse")
        found["moe_layers_enum"] = ",".join(sparse)
    if isinstance(kinds, list) and isinstance(rope, dict):
        by_layer = [rope.get(str(kind)) or {} for kind in kinds]
        if all(isinstance(one, dict) for one in by_layer):
            found["rope_theta"] = [one.get("rope_theta") for one in by_layer]
            shares = [one.get("partial_rotary_factor", 1.0) for one in by_layer]
            found["partial_rotary_factors"] = shares
            full = rope.get("full_attention")
            if isinstance(full, dict) and full.get("rope_type", "default") != "default":
                scaling = {k: v for k, v in full.items() if k not in _ROTATES}
                found["rope_scaling"] = {"rope_type": full["rope_type"], **scaling}
                found.setdefault("yarn_only_types", ["full_attention"])
    if isinstance(kinds, list) and "sliding_attention" in kinds:
        found["attention_other_setting"] = {
            "attention_type": "sliding_attention",
            "num_attention_heads": config.get("num_sliding_attention_heads"),
            "num_attention_groups": _groups(config, kinds),
            "head_dim": config.get("head_dim"),
        }
    return found


def _groups(config: Mapping[str, object], kinds: list[object]) -> object:
    """Of layers with a window, which may have their own."""
    own = config.get("per_layer_config")
    layer = str(kinds.index("sliding_attention"))
    said = own.get(layer) if isinstance(own, dict) else None
    groups = said.get("num_key_value_heads") if isinstance(said, dict) else None
    return groups or config.get("num_key_value_heads")


def _renamed(config: Mapping[str, object]) -> dict[str, object]:
    hub = {old: new for old, new in _RENAMED.items() if new not in config}
    return {hub.get(name, name): value for name, value in config.items()}


def of_decoder(config: Mapping[str, object]) -> dict[str, object]:
    """`config` of a Step-3.5 with a list for what may differ between layers, and no more in it than
    layers of the decoder; others as they are."""
    layers = config.get("num_hidden_layers")
    if config.get("model_type") != MODEL_TYPE or type(layers) is not int or not 0 < layers < 10_000:
        return dict(config)
    found = _renamed(config)
    if isinstance(found.get("rope_theta"), int | float):
        found["rope_theta"] = [found["rope_theta"]] * layers
    for name in _LISTS:
        if isinstance(value := found.get(name), list):
            found[name] = value[:layers]
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        limits = found.get(name)
        listed = limits if isinstance(limits, list) and limits else [None] * layers
        found[name] = [0.0 if limit is None else limit for limit in listed]
    shares = found.get("partial_rotary_factors")
    found["partial_rotary_factors"] = shares if isinstance(shares, list) else [1.0] * layers
    rotate = found.get("use_rope_layers")
    if rotate is None or (isinstance(rotate, list) and all(rotate)):
        found["use_rope_layers"] = []
    sparse = found.get("moe_layers_enum")
    if isinstance(sparse, list):
        found["moe_layers_enum"] = ",".join(map(str, sparse))
    other = found.get("attention_other_setting")
    if isinstance(other, dict):
        found["attention_other_setting"] = {"true_head_dim": other.get("head_dim"), **other}
    return found
