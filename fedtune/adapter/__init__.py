"""What is trained: small modules attached to a frozen base, as one ordered flat vector."""
