"""Checkpoints: written aside, hashed, committed by a rename, verified before they are trusted."""
