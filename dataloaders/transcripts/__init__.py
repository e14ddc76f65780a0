"""Transcripts of videos' sound: `python -m dataloaders.transcripts`, and `read_transcript` for prompts."""

from dataloaders.transcripts.files import read_transcript

__all__ = ["read_transcript"]
