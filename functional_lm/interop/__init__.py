"""Doors to other programs: Hugging Face in and out."""
