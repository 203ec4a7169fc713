"""Masked transformers for class labels and for text, and the published sizes."""
