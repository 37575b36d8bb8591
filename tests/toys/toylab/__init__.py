"""What a user's own package may hold: one of each kind that ecgscale does not know."""
