"""Formats of quantised weights: what their tensors mean. They know no model and no layer."""
