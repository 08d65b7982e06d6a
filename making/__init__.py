"""Text out of a model, and how likely it finds one."""
