"""Transcripts of videos' sound: `python -m dataloaders.transcripts`, and `read_transcript` and `Transcripts` for prompts."""

from dataloaders.transcripts.files import read_transcript
from dataloaders.transcripts.folder import Transcripts

__all__ = ["Transcripts", "read_transcript"]
