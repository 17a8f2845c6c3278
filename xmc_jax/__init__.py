"""Extreme multi-label classification with Siamese encoders in JAX (ViXML, arXiv 2511.13189)."""

__version__ = "0.1.0"
