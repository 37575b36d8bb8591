"""What a user's own package may hold: an objective, an encoder and a task that ecgscale does not know."""
