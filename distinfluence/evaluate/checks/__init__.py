"""Checks of scores against models that are trained again."""
