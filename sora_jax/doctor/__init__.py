"""Examine a machine or a run folder and report in sentences. Nothing is written."""
