"""The dry run: the costs of a run before it starts, and their text."""
