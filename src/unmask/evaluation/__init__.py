"""Measuring generated pictures: features, metrics and studies."""
