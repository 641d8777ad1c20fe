"""This process among the ranks: who am I, strategy, votes, a request to stop, how it ends."""
