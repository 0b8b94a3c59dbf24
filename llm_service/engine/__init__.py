"""Continuous batching over transformers' own text model."""
