"""Names of the environment variables by which ecgscale-launch tells ranks what only it knows. Imports nothing."""

MEETING_TIMEOUT_S = "ECGSCALE_MEETING_TIMEOUT_S"  # how long ranks wait for each other at the start
NODES = "ECGSCALE_NODES"  # names of the nodes, comma-separated, with equally many ranks each
HANG_S = "ECGSCALE_HANG_S"  # without progress for so long, ranks are held to be stuck; 0: never
SUPERVISOR = "ECGSCALE_SUPERVISOR"  # process of this machine without which the ranks save and end
SAVE_S = "ECGSCALE_SAVE_S"  # how long they may take for that
