"""The cache of a frozen tower's outputs."""
