"""Text to token files: sources, workers, assembly."""
