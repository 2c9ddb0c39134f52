"""Scores of models on a prepared dataset, and what follows from them."""
