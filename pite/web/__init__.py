"""A web page to try a model: upload a video, type a question, watch the answer and where it happens."""
