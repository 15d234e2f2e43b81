"""Branch: what the preview's states are worth, and what an iteration with them costs."""
