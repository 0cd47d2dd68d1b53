"""What every stage uses and what uses none of them: errors, files, hashing, versions, the command line."""
