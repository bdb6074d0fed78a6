"""Checks of what the user passes as model, batch and loss. Messages name the argument, the cause and the remedy."""
