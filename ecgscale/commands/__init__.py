"""What the `ecgscale` command can do: a dataclass per command, whose fields are its options."""
