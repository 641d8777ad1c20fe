"""How samples become batches: order, forms, random numbers, worker processes."""
