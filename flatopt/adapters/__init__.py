"""Low-rank modules: which frozen weights lie under them, and what they add to these."""
