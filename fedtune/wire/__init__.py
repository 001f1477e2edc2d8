"""What travels: the messages of `proto/fedtune/v1`, encoded, decoded strictly and bounded."""
