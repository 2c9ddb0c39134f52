"""Annotation files and images to a prepared dataset, and back."""
