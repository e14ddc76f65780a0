"""Answers with the boxes and masks of what they name: `python -m pite.ground`, and `pite.ground.grounding.Grounder`."""
