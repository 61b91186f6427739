"""Adding two three-digit numbers."""
