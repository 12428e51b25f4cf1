"""Between this package and the rest of the world: checkpoints of other layouts, and checkpoints with their code."""
