"""Parts for srcflow that cannot be loaded, and one that can."""
