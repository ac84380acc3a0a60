"""Engines for replays, demonstrations and tests: a virtual clock, step-time profiles, a tiny model, forced lengths."""
