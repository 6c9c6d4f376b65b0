"""Task examples on their way to token batches whose tokens are prompt, response or padding."""
