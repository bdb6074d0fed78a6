"""EKFAC beside kronfluence: fit and scores, time and memory."""
