"""The experiments: one YAML file a run, and the commands that read them."""
