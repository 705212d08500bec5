"""Measure training and decoding against transformers or another checkout."""
