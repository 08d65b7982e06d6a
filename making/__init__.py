"""Text out of a model, how likely it finds one, and what model.py has of its own for compiling."""
