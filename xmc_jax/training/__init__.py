"""A run: losses, the step, tables, the curriculum, checkpoints, the loop."""
