"""What stands around the loop: set-up, state, run status, evaluation, failures."""
