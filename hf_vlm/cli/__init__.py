"""The command line, `hf-vlm`."""
