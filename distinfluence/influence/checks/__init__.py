"""Checks of the derivatives that a fit relies on, at a few samples, before anything is computed."""
