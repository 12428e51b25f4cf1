"""What the command line runs: whole jobs, put together from the public parts of the package."""
