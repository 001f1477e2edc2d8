"""What a person sees of a run: progress, tables, TensorBoard events, the HTML report."""
