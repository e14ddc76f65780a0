"""`python -m bench.gpu`: a session on a GPU, in sections of which each saves what it has measured at once."""
