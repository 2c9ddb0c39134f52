"""Shapes, masks, images, prompts and coordinate frames: plain arrays, no model and no Ray."""
