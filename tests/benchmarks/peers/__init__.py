"""Ours beside the peers, each in an interpreter of its own."""
