"""How ranks get started: on this machine, on many, as a batch job; and doctor."""
