"""Kinds of wrong numbers that come without a word: each is right, or refused with a message that says why."""
