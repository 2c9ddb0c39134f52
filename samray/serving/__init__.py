"""The HTTP endpoint, and the annotation tools that use it."""
