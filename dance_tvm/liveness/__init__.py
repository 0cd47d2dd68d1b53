"""What is zero, and what nobody reads."""
