"""What a user's own package may hold: an objective and an encoder that ecgscale does not know."""
