"""Masks for images that have none: by prompts, or of every object."""
