"""Tensors of an adapter: deltas, their compression, their merge, and the transformer that makes them."""
