"""How the loss falls with the size of the model and with the tokens that it has seen: ladders of runs, and the law."""
