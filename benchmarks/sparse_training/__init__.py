"""Training sparse networks from scratch: what is reached, and in what time."""
