"""Tensors kept in any precision: codecs, rounding, and 8-bit weights."""
