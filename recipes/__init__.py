"""The recipes of hf_vlm: one script a training stage, with its YAML files in a folder of the same name."""
