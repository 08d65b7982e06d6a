"""Text to numbers and back: tokens, token files, batches. It knows no model."""
