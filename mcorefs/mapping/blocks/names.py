"""What most families call their layers, on both sides."""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER, MLAYER = "model.layers.{layer}.", "decoder.layers.{layer}."
INPUT_NORM = (
    MLAYER + "self_attention.linear_qkv.layer_norm_",
    MLAYER + "input_layernorm.",
)
"""Where the norm before attention may be, up to the parameter: part of the linear layer behind it
(TransformerEngine), or on its own."""
MLP_NORM = (MLAYER + "mlp.linear_fc1.layer_norm_", MLAYER + "pre_mlp_layernorm.")
"""Likewise the norm before the MLP; that of a layer of experts is on its own."""
ATTENTION_OUTPUT_NORM = (
    MLAYER + "self_attention.linear_proj.post_layernorm.",
    MLAYER + "self_attention.post_self_attn_layernorm.",
    MLAYER + "post_self_attn_layernorm.",
)
"""Where a norm of what attention puts out may be: Megatron-Bridge's, ms-swift's and slime's."""
MLP_OUTPUT_NORM = (
    MLAYER + "mlp.linear_fc2.post_layernorm.",
    MLAYER + "mlp.post_mlp_layernorm.",
    MLAYER + "post_mlp_layernorm.",
)
"""Likewise of what the MLP puts out."""
