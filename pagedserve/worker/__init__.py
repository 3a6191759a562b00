"""A worker: one device, its weights, its KV cache, and what every active sequence needs there."""
