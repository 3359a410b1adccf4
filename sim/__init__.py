"""The other driver: the same peers in virtual time."""
