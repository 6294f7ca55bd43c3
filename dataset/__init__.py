"""Prompts: class labels, captions, and how the public prompt files are fetched. No image is ever read."""
