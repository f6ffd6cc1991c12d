"""The named mesh and where every array lies on it."""
