"""Judges: one file each, images and prompts in, raw scores out. `registry.py` builds them by name."""
