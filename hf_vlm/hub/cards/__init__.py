"""Model cards: one file a family."""
