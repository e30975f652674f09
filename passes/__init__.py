"""Passes: one file, one rewrite of a model."""
