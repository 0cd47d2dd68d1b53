"""What is zero, and what is never read."""
