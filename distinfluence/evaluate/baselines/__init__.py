"""Scores without gradients, in the form of any other result: what a method must beat."""
