"""Questions about videos: `python -m pite.chat`, and `pite.chat.session.Session` in Python."""
