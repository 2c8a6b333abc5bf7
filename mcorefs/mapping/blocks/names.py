"""What most families call their layers, on both sides."""

LAYER, MLAYER = "model.layers.{layer}.", "decoder.layers.{layer}."
