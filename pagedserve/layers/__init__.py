"""Layers: plain objects that hold tensors and call kernels; they know no checkpoint, no model."""
