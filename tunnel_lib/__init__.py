"""What the shell scripts did not do: one file for each such thing, loaded when an option asks for it."""
