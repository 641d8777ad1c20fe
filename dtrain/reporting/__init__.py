"""What a person sees: lines, bars, summary, pictures of a validation."""
