"""Start ecgscale jobs on one machine or a cluster."""
