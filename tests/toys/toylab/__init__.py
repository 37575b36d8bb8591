"""What a user's own package may hold: an objective, an encoder, a task and a layout that ecgscale does not know."""
