"""The named mesh, and how every array is sharded over it."""
