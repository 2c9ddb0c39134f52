"""Every object of an image: a decoder beside SAM's mask decoder, and what is made of its maps."""
