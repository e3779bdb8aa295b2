"""Plumbing that a reader may skip: what the scripts stand on."""
