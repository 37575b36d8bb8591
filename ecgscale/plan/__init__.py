"""`ecgscale plan`: what a pretraining run needs and how long it takes, before it is started. See docs/planning.md."""
